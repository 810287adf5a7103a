"""Tensors and small Python objects between the ranks of a group."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megarec.parallel.groups import Group

T = TypeVar("T")


def broadcast_object(value: Any, group: Group) -> Any:
    """The small Python object of the first rank of `group`, on every rank of it. Collective."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group.process_group, group_src=0)
    return box[0]


def broadcast_tensor(tensor: Tensor, group: Group) -> Tensor:
    """The values of the first rank of `group` in `tensor`, in place, on every rank of it. Collective."""
    dist.broadcast(tensor, group=group.process_group, group_src=0)
    return tensor


def gather_objects(value: T, group: Group) -> list[T]:
    """The small Python objects of all ranks of `group`, in rank order, on every rank of it. Collective."""
    gathered: list[Any] = [None] * group.size
    dist.all_gather_object(gathered, value, group=group.process_group)
    return gathered
