"""What the ranks of a job tell each other when one of them ends by an error, outside of any process group."""

import contextlib
import datetime
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megarec.parallel.groups import ProcessInfo

_REACH_SECONDS = 10.0  # to find the store
_END_SECONDS = 5.0  # for the others to come to the same end; who waits in a collective cannot
_NOTICE_SECONDS = 3.0  # a rank that refuses says so before its connections close; the rest is slack
_POLL_SECONDS = 0.02
_REFUSED, _ENDED, _LEFT = "refused", "ended", "left"


class TorchrunPeers:
    """The ranks of a job, reached through the store at which they meet, also before and after a process group.

    Implements `megarec.base.errors.Peers`. A store that cannot be reached is as if there were no other ranks: a line
    that is said twice is better than one that is lost.

    Args:
        process: what the launcher said; its rendezvous is `env://`.
        attempt: how often the launcher has started the ranks again. The store may outlive an attempt: a line is said
            once in all of them, but who ended one is not the reason of an error in the next.
    """

    def __init__(self, process: ProcessInfo, attempt: int = 0) -> None:
        self._process = process
        self._attempt = attempt

    def refuse(self, line: str, code: int) -> None:
        """Says `line` unless another rank has, then waits for the others a while, so that all end by themselves."""
        # From here on the exit code is known: the launcher's SIGTERM after the end of one rank must not change it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store = self._reach()
        if store is None or _count(store, f"megarec/said/{line}") == 1:
            print(line, file=sys.stderr, flush=True)  # noqa: T201
        if store is not None:
            with contextlib.suppress(RuntimeError):
                store.set(self._key(_REFUSED), str(code))
                self._end_together(store)

    def refused(self) -> int | None:
        """The exit code that another rank refused with, or None when none did so within three seconds."""
        store = self._reach()
        if store is None:
            return None
        try:
            if not _await(lambda: store.check([self._key(_REFUSED)]), _NOTICE_SECONDS):
                return None
            code = int(store.get(self._key(_REFUSED)))
        except RuntimeError:
            return None
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):
            self._end_together(store)
        return code

    def _reach(self) -> Any:
        """The store of the job, which torch does not annotate, or None."""
        try:
            store, _, _ = next(
                dist.rendezvous(  # type: ignore[attr-defined]
                    self._process.rendezvous,
                    rank=self._process.rank,
                    world_size=self._process.world,
                    timeout=datetime.timedelta(seconds=_REACH_SECONDS),
                )
            )
        except (RuntimeError, ValueError):
            return None
        return store

    def _end_together(self, store: Any) -> None:
        store.add(self._key(_ENDED), 1)
        if not _await(lambda: store.add(self._key(_ENDED), 0) >= self._process.world, _END_SECONDS):
            return
        store.add(self._key(_LEFT), 1)
        if self._process.rank == 0:  # hosts the store where torchrun's agent does not
            _await(lambda: store.add(self._key(_LEFT), 0) >= self._process.world, _END_SECONDS)

    def _key(self, what: str) -> str:
        return f"megarec/{self._attempt}/{what}"


def _count(store: Any, key: str) -> int:
    try:
        return store.add(key, 1)
    except RuntimeError:
        return 1


def _await(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` comes true in time; `Store.wait` would write to standard error when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
