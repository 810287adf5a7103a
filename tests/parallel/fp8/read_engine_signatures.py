"""Writes `engine_signatures.json`: how the calls that are made of Transformer Engine are declared.

    pip download --no-deps transformer-engine==2.11.0
    python tests/parallel/fp8/read_engine_signatures.py transformer_engine-2.11.0-py3-none-any.whl

The wheel of this name holds the Python sources of all of it; nothing in it is run.
"""

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

TARGET = Path(__file__).with_name("engine_signatures.json")
CALLS = {
    "Linear": ("transformer_engine/pytorch/module/linear.py", "Linear.__init__"),
    "Linear.forward": ("transformer_engine/pytorch/module/linear.py", "Linear.forward"),
    "autocast": ("transformer_engine/pytorch/quantization.py", "autocast"),
    "DelayedScaling": ("transformer_engine/common/recipe/__init__.py", "DelayedScaling"),
    "Float8CurrentScaling": ("transformer_engine/common/recipe/__init__.py", "Float8CurrentScaling"),
    "Float8BlockScaling": ("transformer_engine/common/recipe/__init__.py", "Float8BlockScaling"),
    "FusedAdam": ("transformer_engine/pytorch/optimizers/fused_adam.py", "FusedAdam.__init__"),
    "FusedAdam.step": ("transformer_engine/pytorch/optimizers/fused_adam.py", "FusedAdam.step"),
}


def parameters(node: ast.AST) -> list[dict[str, Any]]:
    """Of a function, without `self`; of a dataclass, its fields."""
    if isinstance(node, ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
        return [
            {"name": f.target.id, "keyword": False, "required": f.value is None}  # type: ignore[union-attr]
            for f in fields
        ]
    assert isinstance(node, ast.FunctionDef)
    given = node.args
    assert not given.posonlyargs and given.vararg is None and given.kwarg is None, node.name
    required = len(given.args) - len(given.defaults)
    found = [
        {"name": argument.arg, "keyword": False, "required": number < required}
        for number, argument in enumerate(given.args)
    ]
    found += [
        {"name": argument.arg, "keyword": True, "required": default is None}
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    return [parameter for parameter in found if parameter["name"] != "self"]


def find(tree: ast.AST, path: str) -> ast.AST:
    for name in path.split("."):
        (tree,) = (node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == name)
    return tree


def read(wheel: Path) -> dict[str, Any]:
    with ZipFile(wheel) as archive:
        calls = {name: parameters(find(ast.parse(archive.read(file)), path)) for name, (file, path) in CALLS.items()}
    package, version = wheel.name.split("-")[:2]
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return {"package": package, "version": version, "sha256": digest, "calls": calls}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(read(Path(sys.argv[1])), indent=1) + "\n")
