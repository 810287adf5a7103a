import ast
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import megarec.parallel.mcore  # noqa: F401
from megarec.parallel.megatron_on_cpu import install, rewrite

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is installed")


def test_torch_is_left_as_it_is() -> None:
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    assert torch.cuda.Stream.__module__.startswith("torch.cuda")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_no_call_to_cuda_is_left_in_the_modules_in_use() -> None:
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("megatron.core")]
    assert len(modules) > 50
    rewritten = 0
    for module in modules:
        path = getattr(module, "__file__", None)
        if not path or not path.endswith(".py"):
            continue
        assert type(module.__loader__).__module__ == "megarec.parallel.megatron_on_cpu", path
        source = Path(path).read_text()
        if "cuda" not in source:
            continue
        rewritten += "torch.cuda." in source
        for node in ast.walk(rewrite(source, path)):
            if isinstance(node, ast.Attribute) and node.attr == "cuda":
                assert ast.unparse(node) != "torch.cuda", path
            if isinstance(node, ast.keyword) and node.arg == "device":
                assert ast.unparse(node.value) != "'cuda'", path
    assert rewritten > 10


def test_every_form_is_rewritten_and_lines_are_kept() -> None:
    source = """# torch.cuda in a comment
x = torch.zeros(1, device="cuda")
y = x.cuda(torch.cuda.current_device()).cuda()
z = y.type() == "torch.cuda.FloatTensor"
"""
    tree = rewrite(source, "made_up.py")
    assert [node.lineno for node in tree.body] == [2, 3, 4]
    namespace = {"torch": torch}
    exec(compile(tree, "made_up.py", "exec"), namespace)
    assert namespace["z"]


@pytest.mark.parametrize("error", ["RuntimeError('Found empty meta package')", "OSError('libcuda.so is missing')"])
def test_a_broken_transformer_engine_is_said_in_a_line(tmp_path: Path, error: str) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}\n")
    (tmp_path / "data").mkdir()
    command = [sys.executable, "-m", "megarec.cli.train", f"data={tmp_path / 'data'}", "experiment=quickstart"]
    search = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [*command, f"run_dir={tmp_path / 'run'}"],
        check=False,
        env={**os.environ, "PYTHONPATH": search},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2, done.stderr
    assert "pip uninstall transformer-engine" in done.stderr
    assert error.split("'")[1] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed")
def test_a_fused_optimizer_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformer_engine.pytorch", "apex"):
        optimizers = ModuleType(f"{package}.optimizers")
        optimizers.FusedAdam = optimizers.FusedSGD = None
        monkeypatch.setitem(sys.modules, optimizers.__name__, optimizers)
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    for name, choice, fused in (
        ("", "USING_PYTORCH_OPTIMIZER", False),
        (".distrib_optimizer", "HAVE_APEX_OR_TE", True),
    ):
        source = Path(sys.modules[f"megatron.core.optimizer{name}"].__file__).read_text()
        part = source[source.index("try:\n    from transformer_engine") :]
        part = part[: part.index("\nfrom ")]
        for tree, chosen in ((ast.parse(part), fused), (rewrite(part, "part.py"), not fused)):
            namespace = {"warnings": warnings, "HAVE_APEX_OR_TE": True}
            exec(compile(tree, "part.py", "exec"), namespace)
            assert namespace[choice] is chosen


def test_installing_twice_changes_nothing() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


def test_installing_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [finder for finder in sys.meta_path if type(finder).__module__ == install.__module__]
    assert len(ours) == 1
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder not in ours])
    with pytest.raises(AssertionError, match="was imported before"):
        install()


@pytest.mark.parametrize("module", ["megarec.parallel.layout", "megarec.optim.config", "megarec.embedding.config"])
def test_settings_are_light(module: str) -> None:
    code = f"import {module}, sys; assert not {{'torch', 'numpy', 'megatron'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
