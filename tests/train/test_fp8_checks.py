"""What FP8 cannot do is refused before any process group is made."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megarec.base.errors import UserError
from megarec.parallel.fp8.precision import Precision
from megarec.parallel.fp8.requirements import why_no_engine
from megarec.train.checks import check_run
from tests.train.runs import SMALL_ARGUS, SMALL_HSTU, SMALL_SASREC, make_config

STREAM = {"tokens_per_pack": 128, "lanes": 2, "pool_blocks": 1, "max_history_events": 12, "packs_per_lane": 2}
REFERENCE: dict[str, Any] = {"precision": "fp8_current", "layout": {"linears": "fp8_reference"}, "stream": STREAM}


def layout(**sizes: Any) -> dict[str, Any]:
    return {**REFERENCE, "layout": {"linears": "fp8_reference", **sizes}}


def te(**settings: Any) -> dict[str, Any]:
    return {"layout": {"linears": "te"}, "stream": STREAM, **settings}


def block(model: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**model, "block": {**model["block"], **values}}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8 by Megatron-Core": ({"precision": "fp8_current"}, "^precision: fp8_current needs split maps"),
    "reference in bf16": ({**REFERENCE, "precision": "bf16"}, "^layout.linears: the reference knows"),
    "reference, delayed": ({**REFERENCE, "precision": "fp8_delayed"}, "^layout.linears: the reference knows"),
    "engine on the CPU": (
        te(device="cpu"),
        "^layout.linears: Transformer Engine cannot be used: the run is on the CPU",
    ),
    "engine and recomputation": (
        te(precision="fp8_delayed", layout={"linears": "te", "recompute": "block"}),
        "^layout.recompute",
    ),
    "width": ({**REFERENCE, "model": {**SMALL_ARGUS, "width": 24}}, "^model.width: a rank has 24"),
    "split width": ({**layout(tensor=2)}, "^model.width: a rank has 8 "),
    "feed-forward": (
        {**REFERENCE, "model": block(SMALL_SASREC, feed_forward_width=24)},
        "^model.block.feed_forward_width: a rank has 24",
    ),
    "values": (
        {**REFERENCE, "model": block(SMALL_HSTU, v_head_width=4)},
        "^model.block.v_head_width: a rank has 8 ",
    ),
    "queries": (
        {**REFERENCE, "model": block(SMALL_HSTU, qk_head_width=10)},
        "^model.block.qk_head_width: a rank has 72",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(tmp_path: Path, name: str) -> None:
    settings, message = REFUSED[name]
    world = settings.get("layout", {}).get("tensor", 1)
    with pytest.raises(UserError, match=message) as error:
        check_run(make_config(tmp_path, tmp_path, **settings), world=world)
    assert error.value.fix


@pytest.mark.parametrize("model", [SMALL_ARGUS, SMALL_HSTU])
def test_what_fits_passes(tmp_path: Path, model: dict[str, Any]) -> None:
    check_run(make_config(tmp_path, tmp_path, **REFERENCE, model=model), world=1)


def test_blocks_of_128_need_widths_of_128(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch)
    model = {**SMALL_ARGUS, "width": 128}
    settings = te(precision="fp8_blockwise", model=model)
    check_run(make_config(tmp_path, tmp_path, **settings), world=1)
    with pytest.raises(UserError, match="needs a multiple of 128"):
        check_run(make_config(tmp_path, tmp_path, **{**settings, "model": {**model, "width": 64}}), world=1)
    with pytest.raises(UserError, match=r"^stream.tokens_per_pack: a rank has 96"):
        stream = {**STREAM, "tokens_per_pack": 96}
        check_run(make_config(tmp_path, tmp_path, **{**settings, "stream": stream}), world=1)


def give_gpu(
    monkeypatch: pytest.MonkeyPatch,
    *,
    capability: tuple[int, int] = (9, 0),
    version: str = "2.11.0",
    cuda: str = "13.0",
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    package = ModuleType("transformer_engine")
    package.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))


@pytest.mark.parametrize(
    ("machine", "precision", "lacking"),
    [
        ({}, "fp8_blockwise", ""),
        ({"capability": (8, 9)}, "fp8_delayed", ""),
        ({"capability": (8, 9)}, "fp8_blockwise", "compute capability 8.9, and fp8_blockwise needs 9.0"),
        ({"capability": (8, 6)}, "fp8_current", "compute capability 8.6, and fp8_current needs 8.9"),
        ({"capability": (8, 0)}, "bf16", ""),
        ({"cuda": "12.8"}, "fp8_blockwise", "CUDA 12.8"),
        ({"version": "2.8.0"}, "bf16", "2.8.0 is installed, and Megatron-Core takes 2.9 up to 2.12"),
        ({"version": "2.12.0"}, "bf16", "2.12.0 is installed"),
        ({"version": "2.9.0+cu13"}, "bf16", ""),
    ],
)
def test_the_machine_is_asked(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], precision: Precision, lacking: str
) -> None:
    give_gpu(monkeypatch, **machine)
    found = why_no_engine(precision)
    assert lacking in found and bool(lacking) == bool(found)


def test_a_package_without_its_core_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch)

    class Empty:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "transformer_engine":
                raise RuntimeError("Found empty meta package\nsecond line")

    monkeypatch.delitem(sys.modules, "transformer_engine")
    monkeypatch.setattr(sys, "meta_path", [Empty(), *sys.meta_path])
    assert why_no_engine("bf16") == "it cannot be imported: Found empty meta package"


def test_without_a_gpu_the_engine_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    assert why_no_engine("bf16") == "there is no CUDA device"
