"""The ranks of a job and the groups they form, as one value that is built once and passed by hand."""

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megarec.base.errors import UserError
from megarec.parallel.layout import LayoutConfig


@dataclass(frozen=True, kw_only=True)
class ProcessInfo:
    """What the launcher told this process; the defaults are a job of one process.

    Attributes:
        rank: the number of this process in the job.
        world: the number of processes.
        local_rank: the number of this process on its machine, which picks its GPU.
        rendezvous: where the ranks meet, as `torch.distributed` writes it: `env://` under torchrun,
            `file:///path` on one machine. A job of one process needs none and opens no port.
        timeout_seconds: how long a collective may wait for the slowest rank.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    rendezvous: str = ""
    timeout_seconds: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks that share one dimension of the layout, seen from this one."""

    process_group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Who this rank works with.

    Attributes:
        layout: the sizes the groups were built from.
        device: where this rank computes.
        world: all ranks of the job.
        data: the ranks that hold the same piece of the model and see other packs.
        tensor: the ranks that split its layers.
        pipeline: the ranks that hold the other stages.
        context: the ranks that hold the other tokens of its packs.
        copies: data and context ranks together, the ranks that hold equal dense weights and sum their gradients.
        slices: tensor and context ranks together, the ranks that hold the other slices of its packs.
        model: tensor and pipeline ranks together, the ranks of one whole copy of the weights.
        replica: those and the context ranks, the ranks that work on the same packs.
    """

    layout: LayoutConfig
    device: torch.device
    world: Group
    data: Group
    tensor: Group
    pipeline: Group
    context: Group
    copies: Group
    slices: Group
    model: Group
    replica: Group


def start(layout: LayoutConfig, process: ProcessInfo) -> ParallelGroups:
    """Joins the job and builds its groups. Collective; once per process until `stop`.

    Every rank computes on its GPU; on a machine that shows none (`CUDA_VISIBLE_DEVICES=` hides them), on the CPU.

    Args:
        layout: how the ranks share the model.
        process: what the launcher said.

    Raises:
        UserError: the layout does not fit the number of ranks, or the machine has too few GPUs.
    """
    from megarec.parallel.mcore import parallel_state  # two seconds that nobody pays for the types of this module

    layout.data(process.world)
    device = _choose_device(process)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=process.timeout_seconds)
    if process.rendezvous:
        dist.init_process_group(
            backend, init_method=process.rendezvous, rank=process.rank, world_size=process.world, timeout=timeout
        )
    elif process.world == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        raise AssertionError("a job of several processes needs a rendezvous")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        context_parallel_size=layout.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(process.timeout_seconds / 60)),
    )
    return ParallelGroups(
        layout=layout,
        device=device,
        world=_group(dist.group.WORLD),
        data=_group(parallel_state.get_data_parallel_group()),
        tensor=_group(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_group(parallel_state.get_pipeline_model_parallel_group()),
        context=_group(parallel_state.get_context_parallel_group()),
        copies=_group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        slices=_group(parallel_state.get_tensor_and_context_parallel_group()),
        model=_group(parallel_state.get_model_parallel_group()),
        replica=_group(_make_replica_group(parallel_state.get_data_parallel_rank(), layout.data(process.world))),
    )


def stop() -> None:
    """Leaves the job. Collective where the backend is."""
    from megarec.parallel.mcore import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _choose_device(process: ProcessInfo) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if process.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {process.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}",
            where="torchrun",
            fix="Start fewer processes per machine",
        )
    torch.cuda.set_device(process.local_rank)
    return torch.device("cuda", process.local_rank)


def _make_replica_group(data_rank: int, num_replicas: int) -> dist.ProcessGroup:
    """The ranks with the same data-parallel rank; every rank takes part in making every group."""
    data_ranks = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(data_ranks, torch.tensor(data_rank))
    members = [[rank for rank, data in enumerate(data_ranks) if data == replica] for replica in range(num_replicas)]
    group: dist.ProcessGroup = dist.new_subgroups_by_enumeration(members)[0]
    return group


def _group(process_group: dist.ProcessGroup | None) -> Group:
    assert process_group is not None
    return Group(
        process_group=process_group, rank=dist.get_rank(process_group), size=dist.get_world_size(process_group)
    )
