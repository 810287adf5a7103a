"""Evaluation batches: histories, what was asked of them, and what came next."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megarec.base.errors import UserError
from megarec.base.jagged import Int64, gather_indices, lengths_to_offsets, segment_positions
from megarec.data.block import Array, Block
from megarec.data.dataset import AskedSplit, Dataset
from megarec.data.packs import Int32
from megarec.data.reader import BlockReader


@dataclass(frozen=True, kw_only=True)
class EvaluationBatch:
    """B users with at least one target each; B may be 0.

    Attributes:
        user: user index, `[B]`.
        cu_seqlens: where each history begins in the T events, `[B + 1]`.
        position: the event's place in its window, from 0, `[T]`.
        timestamp: in seconds, `[T]`; 0 without timestamps.
        fields: ids of the item and of each context and feedback field, of the newest events of each history, `[T]` or
            `[T, slots]`.
        query_time: when the question is asked, in seconds, `[B]`.
        target_offsets: where each user's targets begin, `[B + 1]`.
        target_fields: ids of each field of the targets, `[M]` or `[M, slots]`, in time order.
        target_timestamp: `[M]`.
        seen_offsets: where each user's seen items begin, `[B + 1]`.
        seen_items: distinct item ids of the whole history, also of its dropped events, ascending per user, `[S]`;
            never the unknown item 0.
        num_dropped_events: events of these histories that are older than their windows.
        num_users_without_target: users left out because nothing is asked about them; each is counted in one batch.
    """

    user: Int64
    cu_seqlens: Int64
    position: Int32
    timestamp: Int64
    fields: dict[str, Int32]
    query_time: Int64
    target_offsets: Int64
    target_fields: dict[str, Int32]
    target_timestamp: Int64
    seen_offsets: Int64
    seen_items: Int64
    num_dropped_events: int
    num_users_without_target: int


def evaluation_batches(
    dataset: Dataset,
    *,
    split: AskedSplit = "eval",
    max_history_events: int,
    users_per_batch: int,
    max_users: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[EvaluationBatch]:
    """The users of a split that have a target, in the order of the shards, in batches of one block each.

    The batches of all ranks, rank after rank, are the batches of one process. Every rank gets the same number of them:
    those without users are there to run every collective.

    Args:
        dataset: what to read.
        split: `eval`, or `valid` to tune on.
        max_history_events: the newest so many events of a history are given.
        users_per_batch: the most users of a batch.
        max_users: at most so many users over all ranks, the first ones, whatever the number of ranks; 0 for all.
        rank: whose batches to give.
        world: the number of ranks.

    Raises:
        UserError: the dataset has no such split; a shard is missing or damaged.
    """
    if not dataset.shards_of(split):
        fix = "Make the shards with split.validation_users or split.validation" if split == "valid" else ""
        raise UserError(f"the dataset has no split '{split}'", where=str(dataset.path), fix=fix)
    reader = BlockReader(dataset, split)
    plan = _plan(reader, users_per_batch=users_per_batch, max_users=max_users)
    sizes = {"users_per_batch": users_per_batch, "max_history_events": max_history_events}
    per_rank = -(-len(plan) // world)
    return _batches(dataset, reader, plan[rank * per_rank : (rank + 1) * per_rank], per_rank=per_rank, sizes=sizes)


def _batches(
    dataset: Dataset, reader: BlockReader, plan: Int64, *, per_rank: int, sizes: dict[str, int]
) -> Iterator[EvaluationBatch]:
    num_ids = dataset.fields["item"].num_ids
    held, block = -1, _empty_block(dataset)
    for number, part, last in plan.tolist():
        if number != held:
            held, block = number, reader.read(number)
        yield _make_batch(block, part=part, last=last, num_ids=num_ids, **sizes)
    for _ in range(per_rank - len(plan)):
        yield _make_batch(_empty_block(dataset), part=0, last=0, num_ids=num_ids, **sizes)


def _plan(reader: BlockReader, *, users_per_batch: int, max_users: int) -> Int64:
    """The (block, part of the block, how many users of the block count) of every batch, `[batches, 3]`.

    Users without a target may leave some batches empty.
    """
    num_users = np.array([reader.num_users(number) for number in range(reader.num_blocks)], dtype=np.int64)
    if max_users:
        before = np.cumsum(num_users) - num_users
        num_users = np.clip(max_users - before, 0, num_users)
    num_parts = -(-num_users // users_per_batch)
    block = np.repeat(np.arange(reader.num_blocks), num_parts)
    return np.stack([block, segment_positions(num_parts), num_users[block]], axis=1)


def _make_batch(
    block: Block, *, part: int, last: int, users_per_batch: int, max_history_events: int, num_ids: int
) -> EvaluationBatch:
    assert block.query_time is not None  # the reader sees to it
    assert block.target_offsets is not None
    num_targets = np.diff(block.target_offsets)
    asked = np.flatnonzero(num_targets)
    users = asked[:last][part * users_per_batch : (part + 1) * users_per_batch]
    lengths = np.diff(block.offsets)[users]
    kept = np.minimum(lengths, max_history_events)
    rows = gather_indices(block.offsets[users] + lengths - kept, kept)
    targets = gather_indices(block.target_offsets[users], num_targets[users])
    seen = gather_indices(block.offsets[users], lengths)
    pairs = np.unique(np.repeat(np.arange(len(users)) * num_ids, lengths) + block.columns["item"][seen])
    pairs = pairs[pairs % num_ids != 0]
    return EvaluationBatch(
        user=block.user[users],
        cu_seqlens=lengths_to_offsets(kept),
        position=segment_positions(kept).astype(np.int32),
        timestamp=block.columns["timestamp"][rows],
        fields=_fields(block.columns, rows),
        query_time=block.query_time[users],
        target_offsets=lengths_to_offsets(num_targets[users]),
        target_fields=_fields(block.target_columns, targets),
        target_timestamp=block.target_columns["timestamp"][targets],
        seen_offsets=lengths_to_offsets(np.bincount(pairs // num_ids, minlength=len(users))),
        seen_items=pairs % num_ids,
        num_dropped_events=int((lengths - kept).sum()),
        num_users_without_target=len(num_targets) - len(asked) if part == 0 else 0,
    )


def _fields(columns: dict[str, Array], rows: Int64) -> dict[str, Int32]:
    return {name: column[rows].astype(np.int32) for name, column in columns.items() if name != "timestamp"}


def _empty_block(dataset: Dataset) -> Block:
    columns: dict[str, Array] = {
        name: np.zeros((0,) if info.slots == 1 else (0, info.slots), dtype=np.int32)
        for name, info in dataset.fields.items()
        if info.role != "item_side"
    }
    columns["timestamp"] = none = np.zeros(0, dtype=np.int64)
    offsets = np.zeros(1, dtype=np.int64)
    return Block(
        user=none, offsets=offsets, columns=columns, query_time=none, target_offsets=offsets, target_columns=columns
    )
