"""Trains a model on a dataset directory. The same command under torchrun:

torchrun --nnodes N --nproc-per-node 8 -m megarec.cli.train data=... model=argus/small run_dir=...

A run directory that holds an interrupted run is continued from its newest checkpoint, bit for bit.
"""

import os
from typing import TYPE_CHECKING

from megarec.base.errors import NoPeers, Peers, UserError
from megarec.cli.command import run
from megarec.metrics.protocol import PROTOCOLS
from megarec.train.config import TrainConfig

if TYPE_CHECKING:
    from megarec.parallel.groups import ProcessInfo


def main() -> None:
    """Runs `megarec-train`."""
    run(
        "megarec-train",
        TrainConfig,
        _work,
        about=__doc__,
        presets="train",
        ready={"protocol": PROTOCOLS},
        peers=find_peers,
    )


def _work(config: TrainConfig) -> None:
    from megarec.base.device import require_device
    from megarec.base.rank_log import RankLog
    from megarec.cli.periodic_evaluation import PeriodicEvaluation
    from megarec.train.run import train

    if config.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    process = read_process_info()
    with RankLog(process.rank) as log:
        require_device(config.device)
        train(config, process, PeriodicEvaluation(), log)


def read_process_info() -> "ProcessInfo":
    """What torchrun put into the environment; without torchrun, a job of one process."""
    from megarec.parallel.groups import ProcessInfo

    if "RANK" not in os.environ:
        return ProcessInfo()
    try:
        return ProcessInfo(
            rank=int(os.environ["RANK"]),
            world=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            rendezvous="env://",
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK is set, but the rest is not as torchrun sets it ({error})", where="environment"
        ) from None


def find_peers() -> Peers:
    """The other ranks that torchrun started, to whom a rank that ends by an error talks."""
    if "RANK" not in os.environ:
        return NoPeers()
    from megarec.train.peers import TorchrunPeers

    try:
        process = read_process_info()
    except UserError:  # the very mistake that is to be told
        return NoPeers()
    if process.world == 1:
        return NoPeers()
    return TorchrunPeers(process, attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


if __name__ == "__main__":
    main()
