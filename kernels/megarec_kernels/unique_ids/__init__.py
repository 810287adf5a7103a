"""The distinct ones of many ids, and where each id went."""

from torch import Tensor

from megarec_kernels.unique_ids.reference import find_unique_reference


def find_unique(ids: Tensor, *, num_ids: int) -> tuple[Tensor, Tensor]:
    """The distinct non-negative values of `ids` in order, and the place of each id among them.

    On CUDA a bitmap of `num_ids` bits if that is cheaper than a sort; see the README. The host waits for the number of
    distinct ids, which is a shape.

    Args:
        ids: int64 of any shape, each in [-1, num_ids), fewer than 2^31; -1 is an empty slot.
        num_ids: a bound of the ids.

    Returns:
        `[U]` int64 sorted, and an index in the shape of `ids` into it, -1 where the id is -1.
    """
    if ids.is_cuda and ids.numel():
        from megarec_kernels.unique_ids.gpu import run_find_unique

        return run_find_unique(ids, num_ids)
    return find_unique_reference(ids, num_ids=num_ids)
