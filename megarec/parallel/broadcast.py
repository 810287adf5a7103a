"""Sending what one rank read to the ranks that work on the same packs."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.parallel.groups import Group

T = TypeVar("T")


def broadcast_tensors(tensors: dict[str, Tensor] | None, group: Group, device: torch.device) -> dict[str, Tensor]:
    """The named tensors of the first rank of `group`, on every rank of it. Collective.

    Args:
        tensors: what to send; only the first rank's is read, the others give None.
        group: who receives.
        device: where the tensors arrive.
    """
    if group.size == 1:
        assert tensors is not None
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    shapes = broadcast_object({n: (t.shape, t.dtype) for n, t in (tensors or {}).items()}, group)
    received = {}
    for name, (shape, dtype) in shapes.items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if group.rank == 0:
            assert tensors is not None
            tensor.copy_(tensors[name])
        dist.broadcast(tensor, group=group.process_group, group_src=0)
        received[name] = tensor
    return received


def broadcast_object(value: Any, group: Group) -> Any:
    """The small Python object of the first rank of `group`, on every rank of it. Collective."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group.process_group, group_src=0)
    return box[0]


def gather_objects(value: T, group: Group) -> list[T]:
    """The small Python objects of all ranks of `group`, in rank order, on every rank of it. Collective."""
    gathered: list[Any] = [None] * group.size
    dist.all_gather_object(gathered, value, group=group.process_group)
    return gathered
