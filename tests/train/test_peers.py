"""One mistake, one line, one exit code, whoever of the ranks sees it."""

import signal
from collections.abc import Callable

import pytest

from megarec.base.errors import UserError, run_command
from megarec.parallel.groups import ProcessInfo
from megarec.train.peers import TorchrunPeers
from tests.ranks import run_ranks


def end(process: ProcessInfo, body: Callable[[int], None]) -> tuple[int, bool]:
    """The exit code of this rank, and whether a launcher's SIGTERM would still change it."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: body(process.rank), peers=lambda: TorchrunPeers(process))
    return int(ended.value.code or 0), signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def all_refuse(_: int) -> None:
    raise UserError("cannot be shared", where="stream.lanes")


def each_refuses(rank: int) -> None:
    raise UserError(f"no dataset on host {rank}")


def one_refuses(rank: int) -> None:
    if rank == 2:
        raise UserError("the shard is damaged")
    raise RuntimeError("connection closed by peer")


def one_disk_is_full(rank: int) -> None:
    if rank == 1:
        raise OSError(28, "No space left on device", "/full")
    raise RuntimeError("connection closed by peer")


@pytest.mark.parametrize(
    ("body", "code", "lines"),
    [
        (all_refuse, 2, ["error: stream.lanes: cannot be shared"]),
        (each_refuses, 2, [f"error: no dataset on host {rank}" for rank in range(3)]),
        (one_refuses, 2, ["error: the shard is damaged"]),
        (one_disk_is_full, 1, ["error: no space left on the disk while writing /full. Free some and run again"]),
    ],
)
def test_what_ends_the_job_is_said_once(
    body: Callable[[int], None], code: int, lines: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(end, 3, body) == [(code, False)] * 3
    assert sorted(capfd.readouterr().err.splitlines()) == lines


def crash(process: ProcessInfo) -> str:
    with pytest.raises(RuntimeError) as raised:
        run_command(broken, peers=lambda: TorchrunPeers(process))
    return str(raised.value)


def broken() -> None:
    raise RuntimeError("a fault of ours")


def test_a_fault_of_ours_stays_a_traceback_on_every_rank() -> None:
    assert run_ranks(crash, 2) == ["a fault of ours"] * 2


def again(process: ProcessInfo) -> int:
    store = TorchrunPeers(process)._reach()  # outlives the attempt, as that of torchrun's agent does
    assert store is not None
    end(process, all_refuse)
    with pytest.raises(SystemExit) as same_attempt:
        run_command(broken, peers=lambda: TorchrunPeers(process))
    with pytest.raises(RuntimeError):
        run_command(broken, peers=lambda: TorchrunPeers(process, attempt=1))
    with pytest.raises(SystemExit):
        run_command(lambda: all_refuse(process.rank), peers=lambda: TorchrunPeers(process, attempt=2))
    return int(same_attempt.value.code or 0)


def test_what_ended_an_attempt_does_not_hide_an_error_of_the_next(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(again, 2) == [2, 2]
    assert capfd.readouterr().err == "error: stream.lanes: cannot be shared\n"


def alone(process: ProcessInfo) -> tuple[int, bool]:
    nowhere = ProcessInfo(rank=1, world=2, rendezvous="env://")
    return end(nowhere, all_refuse)


def test_without_the_others_a_mistake_is_said_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert run_ranks(alone, 1) == [(2, False)]
    assert capfd.readouterr().err == "error: stream.lanes: cannot be shared\n"
