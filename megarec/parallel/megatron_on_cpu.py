"""Megatron-Core on a machine without CUDA: its modules are compiled with the CPU in the place of CUDA.

An import hook rewrites the syntax tree of every `megatron.core` module that names CUDA: `torch.cuda` becomes a
stand-in for the CPU, `device="cuda"` becomes `device="cpu"`, `x.cuda()` becomes `x.cpu()` and the type name
`torch.cuda.FloatTensor` becomes `torch.FloatTensor`. Fused optimizers, which need CUDA, cannot be imported there. Torch
itself stays as it is, for Megatron-Core and for
everybody else. On a machine with CUDA nothing is installed and Megatron-Core runs unmodified.
"""

import ast
import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

_STAND_IN = "cpu_in_place_of_cuda"
_NAMESPACE = "megatron.core"


def install() -> None:
    """Installs the hook once, if this machine has no CUDA device.

    Raises:
        AssertionError: Megatron-Core was imported before, so its modules hold calls to CUDA.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if any(name.startswith(_NAMESPACE) for name in sys.modules):
        raise AssertionError(f"{_NAMESPACE} was imported before megarec.parallel.megatron_on_cpu.install()")
    sys.meta_path.insert(0, _Finder())


def rewrite(source: str, path: str) -> ast.Module:
    """The syntax tree of a Megatron-Core module with the CPU in the place of CUDA; line numbers are kept."""
    tree = _Rewriter().visit(ast.parse(source, path))
    return ast.fix_missing_locations(tree)


class _Rewriter(ast.NodeTransformer):
    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if node.module not in ("transformer_engine.pytorch.optimizers", "apex.optimizers"):
            return node
        return ast.copy_location(ast.Raise(ast.Name("ImportError", ast.Load())), node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name(_STAND_IN, ast.Load()), node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr = "cpu"
            node.args, node.keywords = [], []
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg == "device" and isinstance(node.value, ast.Constant) and node.value.value == "cuda":
            node.value.value = "cpu"
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
            node.value = node.value.replace("torch.cuda.", "torch.")
        return node


class _Nothing:
    """A stream or an event: does nothing, and every method returns None."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _CpuInPlaceOfCuda:
    """What `torch.cuda` means inside Megatron-Core."""

    Stream = Event = _Nothing

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self, device: Any = None) -> None:
        del device

    def empty_cache(self) -> None:
        pass

    def current_stream(self, device: Any = None) -> _Nothing:
        return _Nothing(device)

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        del stream
        return contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType | None:
        source = self.get_data(self.path).decode()
        if "cuda" not in source and ".optimizers" not in source:
            return super().get_code(fullname)
        return compile(rewrite(source, self.path), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        setattr(module, _STAND_IN, _CpuInPlaceOfCuda())
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _NAMESPACE and not fullname.startswith(f"{_NAMESPACE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
