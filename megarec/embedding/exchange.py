"""Which rows a step needs, and the way of rows and gradients between the ranks that use and that own them.

Row `r` of `num_rows` belongs to rank `r % world`, which keeps it as its local row `r // world`: neighbours, and
with them the popular low ids, spread over all ranks. A row's *address* is `owner * rows_per_rank + local row`, so
sorted addresses are grouped by owner and no list is ever sorted again on its way.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.parallel.groups import Group


@dataclass(frozen=True, kw_only=True)
class Route:
    """Who asked whom for how many rows; both ways are collective.

    Attributes:
        asked: rows that this rank asks of each rank, `[world]`.
        served: rows that each rank asks of this one, `[world]`.
        rows: the local rows asked of this rank, asking rank by asking rank, each list sorted, `[sum(served)]`.
        group: the ranks, or None for a job of one.
    """

    asked: list[int]
    served: list[int]
    rows: Tensor
    group: Group | None

    def gather(self, table: Tensor, out: Tensor) -> None:
        """Brings the rows asked for from every rank's `table` `[local rows, E]` to `out` `[sum(asked), E]`."""
        if self.group is None:
            torch.index_select(table, 0, self.rows, out=out)
        else:
            sent = table.index_select(0, self.rows)
            dist.all_to_all_single(out, sent, self.asked, self.served, group=self.group.process_group)

    def send_back(self, values: Tensor) -> Tensor:
        """Sends one vector per row asked for to its owner: `[sum(asked), E]` to `[sum(served), E]`."""
        return _exchange(values, self.asked, self.served, self.group)


def open_route(addresses: Tensor, *, rows_per_rank: int, group: Group | None) -> Route:
    """Tells every owner which of its rows this rank needs. Collective.

    Args:
        addresses: sorted distinct addresses, `[U]`; may be empty.
        rows_per_rank: the length of every rank's share.
        group: the ranks.
    """
    if group is None or group.size == 1:
        count = [addresses.numel()]
        return Route(asked=count, served=count, rows=addresses, group=None)
    bounds = torch.arange(group.size + 1, device=addresses.device) * rows_per_rank
    asked = torch.searchsorted(addresses, bounds).diff()
    served = torch.empty_like(asked)
    dist.all_to_all_single(served, asked, group=group.process_group)
    asked_counts, served_counts = asked.tolist(), served.tolist()
    rows = _exchange(addresses % rows_per_rank, asked_counts, served_counts, group)
    return Route(asked=asked_counts, served=served_counts, rows=rows, group=group)


def _exchange(values: Tensor, sends: list[int], receives: list[int], group: Group | None) -> Tensor:
    if group is None:
        return values
    received = values.new_empty((sum(receives), *values.shape[1:]))
    dist.all_to_all_single(received, values.contiguous(), receives, sends, group=group.process_group)
    return received
