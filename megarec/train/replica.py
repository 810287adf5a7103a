"""One reader per replica: what it read goes to the ranks that hold the other parts of the model.

Every rank of a replica gets the whole packs, so every stage and every chunk indexes the same list by pack number.
"""

from typing import Any

import torch
from torch import Tensor

from megarec.parallel.broadcast import broadcast_object, broadcast_tensor
from megarec.parallel.groups import Group
from megarec.train.batches import PackBatch, StepBatch


def share_step(batch: StepBatch | None, group: Group) -> StepBatch:
    """The step that the first rank of `group` read, on every rank of it. Collective.

    Args:
        batch: what this rank read; None on every rank but the first.
        group: the ranks of one replica.
    """
    if group.size == 1:
        assert batch is not None
        return batch
    layout = broadcast_object(None if batch is None else _describe(batch), group)
    received = {}
    for dtype, numel in layout["sizes"].items():
        flat = torch.empty(numel, dtype=dtype)
        if batch is not None:
            flat = torch.cat([t.reshape(-1) for _, t in _tensors(batch) if t.dtype == dtype])
        received[dtype] = broadcast_tensor(flat, group)
    offsets = dict.fromkeys(received, 0)
    packs = [PackBatch(key=key, columns={}, rows={}) for key in layout["keys"]]
    for (pack, part, name), dtype, shape in layout["tensors"]:
        first, count = offsets[dtype], shape.numel()
        getattr(packs[pack], part)[name] = received[dtype][first : first + count].view(shape)
        offsets[dtype] = first + count
    return StepBatch(packs=packs, position=layout["position"], epochs=layout["epochs"])


def _tensors(batch: StepBatch) -> list[tuple[tuple[int, str, str], Tensor]]:
    """Every tensor of a step with its place: pack number, part, name."""
    return [
        ((number, part, name), tensor)
        for number, pack in enumerate(batch.packs)
        for part in ("columns", "rows")
        for name, tensor in getattr(pack, part).items()
    ]


def _describe(batch: StepBatch) -> dict[str, Any]:
    tensors = _tensors(batch)
    sizes: dict[torch.dtype, int] = {}
    for _, tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return {
        "keys": [pack.key for pack in batch.packs],
        "position": batch.position,
        "epochs": batch.epochs,
        "tensors": [(place, tensor.dtype, tensor.shape) for place, tensor in tensors],
        "sizes": sizes,
    }
