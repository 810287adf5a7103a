"""Tables of one width as one matrix, its rows dealt out over the ranks, with their optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megarec_kernels.table_rows import RowUpdate, make_state, sum_by_row, update_rows
from megarec_kernels.unique_ids import find_unique
from torch import Tensor

from megarec.base.random import derive_key
from megarec.base.random_torch import normal_torch
from megarec.embedding.config import TableConfig, TableSpec
from megarec.embedding.exchange import open_route
from megarec.embedding.lookup import Fetched, gradient_dtype
from megarec.parallel.groups import Group

_GATHERED_AT_ONCE = 1 << 22
_DRAWN_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 24}  # a core's cache; a few launches


@dataclass(frozen=True, kw_only=True)
class OwnedGradients:
    """The gradients of the rows that this rank owns and any rank used in the step.

    Attributes:
        local_rows: distinct and sorted, `[G]`.
        grad: summed over all uses on all ranks, `[G, E]`.
    """

    local_rows: Tensor
    grad: Tensor


class TableGroup:
    """Tables of one width, stored as one matrix whose rows are numbered through and dealt out over `group`.

    A step calls `fetch`, runs forward and backward through `lookup`, then `collect_gradients` and `update`. All
    four are collective: a rank that needs nothing calls them with an empty request. One process runs the same code.

    Args:
        specs: the tables, in the order of their rows.
        width: the width E of every row.
        group: the ranks that share the rows; None is a job of one.
        seed: row values are a function of (seed, table name, row, column), so any number of ranks starts equal.
        device: where the rows live.
        dtype: fp32, fp64 or bf16 (updates of bf16 rows are rounded at random). Optimizer state of bf16 rows is fp32.
        optimizer: how rows are updated.

    Attributes:
        first_row: the number in the matrix of each table's row 0.
        num_rows: rows of all tables.
        width: E.
        step: the number of updates done; a checkpoint restores it.
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        width: int,
        group: Group | None,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        optimizer: TableConfig | None = None,
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        if len(self.specs) != len(specs):
            raise AssertionError("two tables have one name")
        self.width = width
        self.step = 0
        self.first_row: dict[str, int] = {}
        self.num_rows = 0
        for spec in specs:
            self.first_row[spec.name] = self.num_rows
            self.num_rows += spec.num_rows
        self._group = group
        self._rank, self._world = (group.rank, group.size) if group else (0, 1)
        self._rows_per_rank = -(-self.num_rows // self._world)  # the last ranks may keep one row for nothing
        self._optimizer = optimizer or TableConfig()
        self._rounding_key = derive_key(seed, "rounding", *self.specs)
        self._values = torch.zeros(self._rows_per_rank, width, dtype=dtype, device=device)
        self._state = make_state(self._optimizer.kind, self._values, gradient_dtype(dtype))
        for spec in specs:
            self._initialize(spec, derive_key(seed, "table", spec.name))

    def fetch(self, rows: Tensor) -> Fetched:
        """Brings every distinct row of `rows` here once. Collective.

        Args:
            rows: row numbers in the matrix, int64 of any shape, -1 for none; may be empty.

        Raises:
            IndexError: a number is not a row.
        """
        if rows.numel() and not (rows.min() >= -1 and rows.max() < self.num_rows):
            raise IndexError(f"row numbers must be in [-1, {self.num_rows})")
        unique, index = find_unique(self._addresses(rows), num_ids=self._rows_per_rank * self._world)
        route = open_route(unique, rows_per_rank=self._rows_per_rank, group=self._group)
        padded = self._values.new_empty(unique.numel() + 1, self.width)
        padded[-1] = 0
        route.gather(self._values, out=padded[:-1])
        return Fetched(padded, index=index, route=route)

    def collect_gradients(self, fetched: Fetched) -> OwnedGradients:
        """Sends the gradients of `fetched` to the owners, who add them up in the order of ranks. Collective."""
        route = fetched.route
        received = route.send_back(fetched.grad)
        if route.group is None:
            return OwnedGradients(local_rows=route.rows, grad=received)
        rows, order = torch.sort(route.rows, stable=True)
        if not rows.numel():
            return OwnedGradients(local_rows=rows, grad=received)
        distinct, sums = sum_by_row(received, rows, order)
        return OwnedGradients(local_rows=distinct, grad=sums)

    def square_norm(self, owned: OwnedGradients) -> Tensor:
        """The square of the norm of the gradient of all tables, a float64 scalar equal on every rank. Collective."""
        total = torch.linalg.vector_norm(owned.grad).double().square()
        if self._group is not None:
            dist.all_reduce(total, group=self._group.process_group)
        return total

    def update(self, owned: OwnedGradients, *, lr: float, scale: float | Tensor = 1.0) -> None:
        """Updates every touched row once: those that a step fetched, even if the gradient came out as zero.

        Rows that were not fetched change in nothing: neither their moments nor their values decay, as in the fused
        optimizers of FBGEMM. `adam` and `rowwise_adam` correct their bias by the number of updates of the whole table,
        as FBGEMM does.

        Args:
            owned: from `collect_gradients`.
            lr: the learning rate of the step, multiplied by the optimizer's `lr_scale`.
            scale: multiplies the gradients (clipping).
        """
        self.step += 1
        optimizer = self._optimizer
        update = RowUpdate(
            kind=optimizer.kind,
            lr=lr * optimizer.lr_scale,
            scale=scale,
            step=self.step,
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            key=derive_key(self._rounding_key, self.step),
            row_stride=self._world,
            row_offset=self._rank,
        )
        update_rows(self._values, self._state, rows=owned.local_rows, grad=owned.grad, update=update)

    def whole(self, name: str) -> Tensor:
        """All rows of one table on every rank, `[num_rows, E]`, gathered piece by piece. Collective."""
        first, count = self.first_row[name], self.specs[name].num_rows
        if self._group is None or self._world == 1:
            return self._values[first : first + count].clone()
        result = self._values.new_empty(count, self.width)
        rows_at_once = max(1, _GATHERED_AT_ONCE // (self._world * self.width))
        last_local = -(-(first + count) // self._world)
        for start in range(first // self._world, last_local, rows_at_once):
            stop = min(start + rows_at_once, last_local)
            shares = [self._values.new_empty(stop - start, self.width) for _ in range(self._world)]
            dist.all_gather(shares, self._values[start:stop], group=self._group.process_group)
            rows = torch.stack(shares, dim=1).reshape(-1, self.width)  # local row, then owner: the order of the matrix
            begin = start * self._world - first
            into = slice(max(begin, 0), min(begin + rows.shape[0], count))
            result[into] = rows[into.start - begin : into.stop - begin]
        return result

    def state_pieces(self) -> dict[str, Tensor]:
        """This rank's rows and their optimizer state: row `i` of a piece is row `i * world + rank` of the matrix.

        `values` `[local rows, E]` and the state by its names. Not copies: a checkpoint is loaded by filling them, and
        `step`, on a table of any number of ranks.
        """
        local = -(-(self.num_rows - self._rank) // self._world)
        return {name: tensor[:local] for name, tensor in {"values": self._values, **self._state}.items()}

    def _addresses(self, rows: Tensor) -> Tensor:
        if self._world == 1:
            return rows
        return torch.where(rows < 0, rows, rows % self._world * self._rows_per_rank + rows // self._world)

    def _initialize(self, spec: TableSpec, key: int) -> None:
        first = self.first_row[spec.name]
        device = self._values.device
        columns = torch.arange(self.width, device=device)
        begin = -(-(first - self._rank) // self._world)
        end = -(-(first + spec.num_rows - self._rank) // self._world)
        rows_at_once = max(1, _DRAWN_AT_ONCE[device.type] // self.width)
        for start in range(begin, end, rows_at_once):
            stop = min(start + rows_at_once, end)
            rows = torch.arange(start, stop, device=device) * self._world + self._rank - first
            counters = rows.unsqueeze(1) * self.width + columns
            self._values[start:stop] = normal_torch(key, counters) * spec.init_std
