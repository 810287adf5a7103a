"""Several ranks inside one test: forked from this process, so each starts in milliseconds.

    def job(process: ProcessInfo, factor: float) -> float: ...
    results = run_ranks(job, 4, 2.0)

`job` starts its groups with `start(LayoutConfig(...), process)` and returns anything that pickles. An error on any
rank fails the test with that rank's traceback; ranks that hang are killed.
"""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megarec.parallel.mcore  # noqa: F401  (once, before the fork)
from megarec.parallel.groups import ProcessInfo

_GRACE_SECONDS = 3.0


def run_ranks(job: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """What `job(process, *args)` returned on each of `world` ranks, in the order of ranks."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'store'}"
        processes, receivers = [], {}
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            info = ProcessInfo(rank=rank, world=world, local_rank=rank, rendezvous=rendezvous, timeout_seconds=timeout)
            process = context.Process(target=_run_rank, args=(job, info, args, sender), daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            receivers[receiver] = rank
        try:
            return _collect(receivers, world, timeout)
        except BaseException:
            for process in processes:
                process.kill()
            raise
        finally:
            for process in processes:
                process.join()


def _collect(receivers: dict[Any, int], world: int, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while receivers:
        ready = wait(list(receivers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.pop(receiver)
            try:
                done, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                done, value = False, "the process died without a word"
            (results if done else errors)[rank] = value
        if errors:  # the others may wait for the failed rank for ever
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if errors:
        raise AssertionError("\n".join(f"rank {rank} of {world}: {errors[rank]}" for rank in sorted(errors)))
    if receivers:
        raise AssertionError(f"ranks {sorted(receivers.values())} of {world} still ran after {timeout} s")
    return [results[rank] for rank in range(world)]


def _run_rank(job: Callable[..., Any], info: ProcessInfo, args: tuple[Any, ...], sender: Connection) -> None:
    try:
        torch.set_num_threads(1)
        message = pickle.dumps((True, job(info, *args)))
        if dist.is_initialized():
            dist.barrier()  # nobody closes its connections while another still needs them
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(message)
