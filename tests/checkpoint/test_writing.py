"""What training does while a checkpoint is written stays out of it; damage and strangers are refused."""

import json
import threading
from pathlib import Path

import pytest
import torch

import megarec.checkpoint.save as save_module
from megarec.base.errors import UserError
from megarec.base.files import sha256_of
from megarec.checkpoint.load import Checkpoint
from megarec.checkpoint.pieces import Piece, PieceIndex, whole
from megarec.checkpoint.save import CheckpointWriter
from megarec.parallel.groups import ProcessInfo, start, stop
from megarec.parallel.layout import LayoutConfig
from tests.ranks import run_ranks


def save_while_training(process: ProcessInfo, directory: Path) -> tuple[bool, bool]:
    """The weights change while the file is held back, then the best checkpoint is named."""
    start(LayoutConfig(), process)
    go_on, write = threading.Event(), save_module.save_file

    def held_back(*arguments: object) -> None:
        go_on.wait()
        write(*arguments)  # type: ignore[arg-type]

    save_module.save_file = held_back  # type: ignore[assignment]
    weights = torch.arange(6.0)
    writer = CheckpointWriter(directory, rank=0, world_size=1, keep_last=1)
    writer.start(1, [whole("weights", weights)], state={}, config={})
    weights.fill_(-1.0)
    early = (directory / "latest").exists() or (directory / "step-00000001").exists()
    threading.Timer(0.2, go_on.set).start()
    writer.mark_best(1)
    named = (directory / "best").read_text().strip() == "step-00000001" and (directory / "step-00000001").is_dir()
    stop()
    return early, named


def test_a_checkpoint_holds_the_moment_it_was_begun(tmp_path: Path) -> None:
    assert run_ranks(save_while_training, 1, tmp_path) == [(False, True)]
    assert torch.equal(Checkpoint(tmp_path).read_whole("weights"), torch.arange(6.0))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run_ranks(save_while_training, 1, tmp_path)
    return tmp_path / "step-00000001"


def test_one_flipped_bit_is_noticed(saved: Path) -> None:
    file = saved / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum is wrong.*Use an older checkpoint"):
        Checkpoint(saved)


def test_a_file_elsewhere_is_refused_even_if_it_is_there(saved: Path) -> None:
    stranger = saved.parent.parent / f"{saved.parent.name}.safetensors"
    stranger.write_bytes((saved / "rank-00000.safetensors").read_bytes())
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["files"][0] |= {"file": f"../../{stranger.name}", "sha256": sha256_of(stranger)}
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lacks this file"):
        Checkpoint(saved)


def test_a_pointer_to_a_folder_elsewhere_is_refused_even_if_it_is_there(saved: Path) -> None:
    (saved.parent / "other").mkdir()
    (saved.parent / "latest").write_text("other\n")
    with pytest.raises(UserError, match="which is not here"):
        Checkpoint(saved.parent)


class Killed(Exception):
    """Stands for a kill."""


def die_before_the_rename(process: ProcessInfo, directory: Path) -> bool:
    start(LayoutConfig(), process)
    writer = CheckpointWriter(directory, rank=0, world_size=1, keep_last=2)
    writer.start(1, [whole("weights", torch.ones(2))], state={}, config={})
    writer.finish()

    def replace(*_: object) -> None:
        raise Killed

    save_module.os.replace = replace  # type: ignore[assignment]
    writer.start(2, [whole("weights", torch.ones(2))], state={}, config={})
    try:
        writer.finish()
    except Killed:
        return True
    return False


def test_latest_never_names_a_checkpoint_without_its_name(tmp_path: Path) -> None:
    assert run_ranks(die_before_the_rename, 1, tmp_path) == [True]
    assert Checkpoint(tmp_path).step == 1


def save_four_keep_two(process: ProcessInfo, directory: Path) -> None:
    start(LayoutConfig(), process)
    writer = CheckpointWriter(directory, rank=0, world_size=1, keep_last=2)
    for step in (1, 2, 3, 4):
        writer.start(step, [whole("weights", torch.ones(2))], state={}, config={})
        writer.finish()
        if step == 1:
            writer.mark_best(1)
    stop()


def test_the_newest_two_and_the_best_stay(tmp_path: Path) -> None:
    run_ranks(save_four_keep_two, 1, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_tensor_of_another_global_shape_is_refused(saved: Path) -> None:
    wanted = PieceIndex(name="weights", global_shape=(4,), count=4)
    with pytest.raises(UserError, match=r"'weights' has shape \(6,\), the model wants \(4,\)"):
        Checkpoint(saved).load([Piece(index=wanted, values=torch.empty(4))])
