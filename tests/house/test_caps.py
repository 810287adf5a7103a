"""The caps of CONTRIBUTING.md, counted."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "megarec", ROOT / "kernels" / "megarec_kernels", ROOT / "tools" / "megarec_tools")
MAX_PACKAGE_LINES = 27_000
BANNED_NAMES = {"utils", "common", "helpers", "misc"}


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def too_long_functions(source: str) -> list[str]:
    """Of more than 80 lines; bodies of Triton kernels, which are under `triton.jit`, of more than 200."""
    return [f.name for f in functions(ast.parse(source)) if (f.end_lineno or 0) - f.lineno + 1 > limit_of(f)]


def limit_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return 200 if any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list) else 80


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_file(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= (700 if "megarec_kernels" in path.parts else 400)
    assert too_long_functions(source) == []
    assert path.stem not in BANNED_NAMES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Settings")):
            assert len([item for item in node.body if isinstance(item, ast.AnnAssign)]) <= 20, node.name


def test_a_long_function_is_seen() -> None:
    assert too_long_functions("def f():\n" + "    x = 1\n" * 80) == ["f"]
    assert too_long_functions("def f():\n" + "    x = 1\n" * 79) == []
    assert too_long_functions("@triton.jit\ndef f():\n" + "    x = 1\n" * 199) == []
    assert too_long_functions("@triton.jit\ndef f():\n" + "    x = 1\n" * 200) == ["f"]


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: folder.name)
def test_folders_have_at_most_twelve_files(folder: Path) -> None:
    for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir() and path.name != "__pycache__")]:
        files = [path for path in directory.iterdir() if path.suffix in (".py", ".yaml") and path.name != "__init__.py"]
        assert len(files) <= 12, f"{directory.relative_to(ROOT)}: {len(files)} files"


def test_the_packages_stay_small() -> None:
    total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES))
    assert total <= MAX_PACKAGE_LINES, f"{total} lines: delete something, or raise the budget in a commit that says why"


def test_names_of_test_files_are_unique() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == []
