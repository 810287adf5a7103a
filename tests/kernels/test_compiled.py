"""Every Triton kernel compiles for a GPU that is not there, within the registers, spills and memory on record."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = ROOT / "kernels" / "bench" / "compile.py"

pytest.importorskip("triton")


@pytest.mark.parametrize("which", ["--quick", pytest.param("--only=", marks=pytest.mark.slow)])
def test_all_kernels_stay_within_their_bounds(which: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, COMPILE, which], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_launched_is_what_is_recorded() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("launches.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_exceeds_its_bound_is_named() -> None:
    spec = importlib.util.spec_from_file_location("compile_kernels", COMPILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bounds = {"a": {"registers": 100, "spilled_bytes": 0, "shared_bytes": 1000}}
    assert module.complaints(bounds, bounds) == []
    spilling = {"a": {"registers": 100, "spilled_bytes": 8, "shared_bytes": 1000}}
    assert module.complaints(spilling, bounds) == ["a: 8 spilled_bytes, recorded bound 0"]
    assert len(module.complaints({"b": bounds["a"]}, bounds)) == 1
    too_large = {"a": {"registers": 100, "spilled_bytes": 0, "shared_bytes": 300_000}}
    assert "the hardware has" in module.complaints(too_large, too_large)[0]
