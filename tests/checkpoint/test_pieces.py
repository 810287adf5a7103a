"""Any wanted piece is put together from any saved pieces, and incomplete or hostile checkpoints are refused."""

import errno
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import megarec.checkpoint.save as save_module
from megarec.base.errors import UserError
from megarec.checkpoint.load import Checkpoint
from megarec.checkpoint.manifest import step_name
from megarec.checkpoint.pieces import Piece, PieceIndex, fill, whole
from megarec.checkpoint.save import CheckpointWriter
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks


def cut(tensor: torch.Tensor, *, name: str, dim: int, start: int, stride: int) -> Piece:
    count = len(range(start, tensor.shape[dim], stride))
    index = PieceIndex(name=name, global_shape=tuple(tensor.shape), dim=dim, start=start, stride=stride, count=count)
    return Piece(index=index, values=tensor.index_select(dim, index.positions()))


def slices(tensor: torch.Tensor, *, dim: int, parts: int) -> list[Piece]:
    bounds = [tensor.shape[dim] * part // parts for part in range(parts + 1)]
    pieces = []
    for first, last in pairwise(bounds):
        index = PieceIndex(name="x", global_shape=tuple(tensor.shape), dim=dim, start=first, count=last - first)
        pieces.append(Piece(index=index, values=tensor.narrow(dim, first, last - first)))
    return pieces


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 23),
    dim=st.integers(0, 1),
    saved=st.tuples(st.booleans(), st.integers(1, 5)),
    wanted=st.tuples(st.booleans(), st.integers(1, 5)),
)
def test_any_cut_becomes_any_other(rows: int, dim: int, saved: tuple[bool, int], wanted: tuple[bool, int]) -> None:
    shape = (rows, 3) if dim == 0 else (3, rows)
    tensor = torch.arange(rows * 3.0).view(shape)

    def pieces(kind: tuple[bool, int]) -> list[Piece]:
        strided, parts = kind
        if strided:
            return [cut(tensor, name="x", dim=dim, start=part, stride=parts) for part in range(parts)]
        return slices(tensor, dim=dim, parts=parts)

    for target in pieces(wanted):
        values = torch.full_like(target.values, float("nan"))
        filled = torch.zeros(target.index.count, dtype=torch.bool)
        for source in pieces(saved):
            filled |= fill(target.index, values, source.index, source.values)
        assert filled.all()
        assert torch.equal(values, target.values)


def save_job(process: ProcessInfo, directory: Path, fail_on: int) -> str:
    groups = start(LayoutConfig(), process)
    table = torch.arange(10.0)[:, None] * torch.ones(1, 2)
    pieces = [cut(table, name="table", dim=0, start=groups.world.rank, stride=groups.world.size)]
    if groups.world.rank == 0:
        pieces.append(whole("scalar", torch.tensor(3.5)))
        pieces.append(whole("empty", torch.zeros(0, 4)))
    if groups.world.rank == fail_on:
        save_module.save_file = _no_space  # type: ignore[assignment]
    writer = CheckpointWriter(directory, rank=groups.world.rank, world_size=groups.world.size, keep_last=2)
    outcome = "saved"
    try:
        for step in (1, 2, 3):
            writer.start(step, pieces, state={"lanes": {}}, config={"seed": 0})
            writer.finish()
            if step == 1:
                writer.mark_best(1)
    except OSError as error:
        outcome = f"OSError {error.errno}"
    except RuntimeError as error:
        outcome = str(error)
    stop()
    return outcome


def _no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_what_was_saved_is_read(tmp_path: Path, num_ranks: int) -> None:
    assert run_ranks(save_job, num_ranks, tmp_path, -1) == ["saved"] * num_ranks
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best", "latest", "step-00000001", "step-00000002", "step-00000003"]  # the best one stays
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert torch.equal(checkpoint.read_whole("table"), torch.arange(10.0)[:, None] * torch.ones(1, 2))
    assert checkpoint.read_whole("scalar") == 3.5
    assert checkpoint.read_whole("empty").shape == (0, 4)


def test_a_full_disk_on_one_rank_leaves_nothing_and_every_rank_knows(tmp_path: Path) -> None:
    outcomes = run_ranks(save_job, 2, tmp_path, 1)
    assert outcomes[1] == f"OSError {errno.ENOSPC}"
    assert "ranks [1] could not write" in outcomes[0]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run_ranks(save_job, 2, tmp_path, -1)
    return tmp_path / step_name(3)


def edit_manifest(path: Path, change: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_missing_rank_file_is_refused(saved: Path) -> None:
    (saved / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match="lacks this file"):
        Checkpoint(saved)


def test_a_tensor_that_is_not_whole_is_refused(saved: Path) -> None:
    edit_manifest(saved, lambda m: m["files"].pop())
    with pytest.raises(UserError, match="'table' is not whole"):
        Checkpoint(saved).read_whole("table")


def test_a_path_out_of_the_checkpoint_is_refused(saved: Path) -> None:
    edit_manifest(saved, lambda m: m["files"][0].update(file="../../secret.safetensors"))
    with pytest.raises(UserError, match="lacks this file"):
        Checkpoint(saved)


def test_a_manifest_that_lies_about_a_shape_is_refused(saved: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            for piece in file["pieces"]:
                if piece["name"] == "table":
                    piece["global_shape"] = [12, 2]
                    piece["count"] = 6

    edit_manifest(saved, change)
    with pytest.raises(UserError, match="not as the manifest says"):
        Checkpoint(saved).read_whole("table")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_broken_manifest_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(UserError):
        Checkpoint(saved)


def test_a_pointer_elsewhere_is_refused(saved: Path) -> None:
    (saved.parent / "latest").write_text("../../etc")
    with pytest.raises(UserError, match="which is not here"):
        Checkpoint(saved.parent)


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        Checkpoint(tmp_path / "nothing")
