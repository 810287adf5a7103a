"""What the Triton kernels are launched with, made once per pack: programs in a good order, and times as cells."""

from typing import Literal

import torch
from torch import Tensor

from megarec_kernels.hstu_attention.times import PairTimes
from megarec_kernels.tiles import TilePlan
from megarec_kernels.visibility import Visibility

MAX_SUMS = 1 << 26  # 256 MB: 4,096 programs for histories of 16,384 tokens


class Work:
    """What the kernels read besides `q`, `k`, `v` and the biases; made once per pack and shared by all layers.

    Args:
        plan: of the pack.
        times: when the tokens of the pack ask and happened; None without a time bias.
        visibility: which tokens a token sees; None: all before it.

    Attributes:
        num_tokens: of all histories; those behind are dead.
        max_length: of a history.
        num_places: one more than the greatest distance between two tokens.
        unread: int64, stands for what is not read.
        cells: the table by which times find their bucket.
        token_facts: `[T]` int32 on the device, or anything where not needed: when it asks, when it happened, and
            `seen_before`, `group_first`, `place` of the visibility.
    """

    def __init__(self, plan: TilePlan, *, times: PairTimes | None, visibility: Visibility | None) -> None:
        self.plan, self.bounds, self.device = plan, plan.bounds, plan.cu_seqlens.device
        self.visibility = visibility
        self.num_tokens, self.max_length = plan.num_tokens, plan.max_length
        self.num_places = self.max_length
        self.seen_before = self.group_first = self.place = None
        if visibility is not None:
            facts = visibility.seen_before, visibility.group_first, visibility.place
            self.seen_before, self.group_first, self.place = (x.int() for x in facts)
            places = visibility.place[: self.num_tokens]
            self.num_places = max(self.max_length, int(places.max()) + 1 if len(places) else 0)
        times_of_tokens = (None, None) if times is None else (times.asked, times.happened)
        facts = *times_of_tokens, self.seen_before, self.group_first, self.place
        # Triton wants a tensor for every pointer; one that is not read may be any.
        self.unread = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.cells = self.unread if times is None else times.cells
        self.token_facts = tuple(self.unread.int() if x is None else x for x in facts)

    def tasks(self, kind: Literal["queries", "keys"], num_heads: int, block: int) -> Tensor:
        """The programs over blocks of queries or of keys, see `order_tasks`."""
        return self.plan.once(
            ("tasks", kind, num_heads, block),
            lambda: order_tasks(self.bounds, num_heads=num_heads, block=block, last_first=kind == "queries").to(
                self.device
            ),
        )

    def parts(self, num_heads: int, block: int) -> list[tuple[slice, int]]:
        """The programs over blocks of queries in parts, and how many distances the pairs of each part have.

        A row of so many fp32 sums for each program of a part takes at most `MAX_SUMS` numbers, or is that of two.
        """

        def cut() -> list[tuple[slice, int]]:
            lengths: list[int] = self.tasks("queries", num_heads, block)[:, 1].tolist()
            parts, first = [], 0
            while first < len(lengths):
                reach = lengths[first] if self.visibility is None else self.num_places
                num_distances = -(-reach // block) * block
                count = max(2, MAX_SUMS // num_distances // 2 * 2)  # even: what has one number a program stays aligned
                parts.append((slice(first, min(first + count, len(lengths))), num_distances))
                first += count
            return parts

        return self.plan.once(("parts", self.visibility, num_heads, block), cut)

    def plain_tokens(self, num_heads: int, block: int) -> Tensor:
        """For each program over a block of queries, how many first tokens of its history are plain."""
        if self.visibility is None:
            return self.unread
        visibility = self.visibility

        def count() -> Tensor:
            tasks = self.tasks("queries", num_heads, block).cpu()
            history = torch.searchsorted(torch.tensor(self.bounds), tasks[:, 0].contiguous(), right=True) - 1
            return plain_tokens(self.bounds, visibility)[history].to(self.device)

        return self.plan.once(("plain", visibility, num_heads, block), count)

    def reach_of_keys(self, num_heads: int, block: int, rows: int) -> Tensor:
        """For each program over a block of keys, which queries see it, see `reach_of_keys`."""
        if self.visibility is None:
            return self.unread
        visibility = self.visibility

        def find() -> Tensor:
            tasks = self.tasks("keys", num_heads, block).cpu()
            return reach_of_keys(tasks, visibility, block=block, rows=rows).to(self.device)

        return self.plan.once(("reach", visibility, num_heads, block, rows), find)


def order_tasks(cu_seqlens: list[int], *, num_heads: int, block: int, last_first: bool) -> Tensor:
    """One row (first token of the history, its length, number of the block, head) per program, int64, on the CPU.

    Longest histories come first, so that the last programs to start are short ones. The blocks of one head of one
    history are neighbours, so that they find each other's rows in the cache; those with most pairs start first: the
    last blocks of queries, the first blocks of keys.
    """
    starts = torch.tensor(cu_seqlens)
    lengths = starts.diff()
    order = lengths.argsort(descending=True, stable=True)
    blocks = (lengths[order] + block - 1) // block
    user, within, _ = _cut(blocks * num_heads, 1)
    head, number = within // blocks[user], within % blocks[user]
    if last_first:
        number = blocks[user] - 1 - number
    return torch.stack([starts[order][user], lengths[order][user], number, head], dim=1)


def reach_of_keys(tasks: Tensor, visibility: Visibility, *, block: int, rows: int) -> Tensor:
    """Which queries see keys of each task's block, as bounds (begin, end, begin, end) in rows, `[W, 4]` on the CPU.

    The first pair are queries before the block's first key, the second the others. Bounds are whole blocks of `rows`
    queries, and there may be blocks between that see nothing: a mask does the rest.

    Args:
        tasks: of blocks of keys, from `order_tasks`.
        visibility: of the pack.
        block: keys of a block.
        rows: queries of a block.
    """
    first, history = tasks[:, 0].unique(return_inverse=True)
    length = torch.zeros_like(first).scatter_(0, history, tasks[:, 1])
    owner, query, first_query = _cut(length, rows)
    token = first[owner, None] + torch.minimum(query[:, None] + torch.arange(rows), length[owner, None] - 1)
    seen_before, group_first = visibility.seen_before.cpu()[token].amax(1), visibility.group_first.cpu()[token].amin(1)
    owner, key, first_key = _cut(length, block)
    which, place, _ = _cut((length[owner] + rows - 1) // rows, 1)  # every block of keys with every block of queries
    place, key = place + first_query[owner][which], key[which]
    query = query[place]
    early = (query < key) & (seen_before[place] > key)
    late = (query + rows > key) & ((seen_before[place] > key) | (group_first[place] < key + block))
    length, bounds = length[owner], []
    for some in (early, late):
        begin = length.scatter_reduce(0, which[some], query[some], "amin")
        end = torch.zeros_like(length).scatter_reduce_(0, which[some], query[some] + rows, "amax")
        bounds += [torch.minimum(begin, end), torch.minimum(end, length)]
    # A block of queries that straddles the first key stands in both: the second range leaves it to the first.
    bounds[2] = torch.maximum(bounds[2], bounds[1])
    bounds[3] = torch.maximum(bounds[3], bounds[2])
    return torch.stack(bounds, dim=1)[first_key[history] + tasks[:, 2]]


def _cut(lengths: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts lengths into blocks: whose each is, where in it each begins, and the first block of each length."""
    blocks = (lengths + size - 1) // size
    owner = torch.repeat_interleave(blocks)
    first = blocks.cumsum(0) - blocks
    return owner, (torch.arange(len(owner)) - first[owner]) * size, first


def plain_tokens(cu_seqlens: list[int], visibility: Visibility) -> Tensor:
    """Per history, how many first tokens have their number as place and see no later one, `[B]` on the CPU."""
    starts = torch.tensor(cu_seqlens)
    history, row, _ = _cut(starts.diff(), 1)
    place, seen_before = (x[: len(row)].cpu() for x in (visibility.place, visibility.seen_before))
    other = (place != row) | (seen_before > row + 1)
    return starts.diff().scatter_reduce(0, history[other], row[other], "amin")
