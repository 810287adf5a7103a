"""Kernels of others, from Python files outside the repository."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kernels.bench.cases import Case, Method


class Mistake(Exception):
    """What the user asked for cannot be; one line."""


def load_peers(paths: Iterable[str], ops: Mapping[str, Sequence[Case]]) -> dict[str, dict[str, Method]]:
    """The methods of all files, by op and name.

    Raises:
        Mistake: as `load_peer`, or two files give one name.
    """
    methods: dict[str, dict[str, Method]] = {}
    for path in paths:
        for op, named in load_peer(Path(path), ops).items():
            twice = sorted(named.keys() & methods.get(op, {}).keys())
            if twice:
                raise Mistake(f"--peer {path}: {op} {twice[0]!r} is the name of another peer")
            methods.setdefault(op, {}).update(named)
    return methods


def load_peer(path: Path, ops: Mapping[str, Sequence[Case]]) -> dict[str, dict[str, Method]]:
    """The methods by op and name that a file gives: `register()` returns them, or `PEERS` is them.

        def register():
            return {"hstu_attention": {"their kernel": lambda inputs: their_kernel(inputs["q"], ...)}}

    Args:
        path: a Python file; it is run.
        ops: the ops there are.

    Raises:
        Mistake: there is no such file, it fails, or it gives anything else; says what.
    """
    if not path.is_file():
        raise Mistake(f"--peer {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Mistake(f"--peer {path}: is no Python file (its name must end in .py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        methods = module.register() if hasattr(module, "register") else getattr(module, "PEERS", None)
    except Exception as error:  # whatever somebody else's file does
        raise Mistake(f"--peer {path}: {type(error).__name__}: {error}") from error
    if not isinstance(methods, Mapping) or not all(isinstance(named, Mapping) for named in methods.values()):
        raise Mistake(f"--peer {path}: needs register() or PEERS, a dict by op of dicts by name of functions")
    for op, named in methods.items():
        if op not in ops:
            raise Mistake(f"--peer {path}: there is no op {op!r}; there are {', '.join(ops)}")
        taken = {name for case in ops[op] for name in (*case.ours, *case.baselines, *case.beside)}
        for name, method in named.items():
            if name in taken:
                raise Mistake(f"--peer {path}: {op} {name!r} is the name of a method of the benchmark; take another")
            if not callable(method):
                raise Mistake(f"--peer {path}: {op} {name!r} is no function, but {type(method).__name__}")
    return {op: dict(named) for op, named in methods.items()}
