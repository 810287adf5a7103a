"""Evaluation batches hold every user with a target once, in one order, on any number of ranks."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarec.base.errors import UserError
from megarec.data.block import Block
from megarec.data.dataset import Dataset
from megarec.data.evaluation import EvaluationBatch, evaluation_batches
from tests.data.small_datasets import FIELDS, make_block, write_dataset_of, write_histories


def make_blocks() -> list[Block]:
    draw = np.random.default_rng(11)
    sizes = [5, 1, 8, 0, 3, 7]
    blocks = []
    for number, size in enumerate(sizes):
        targets = draw.integers(0, 3, size) if number != 4 else np.zeros(size, dtype=np.int64)
        blocks.append(
            make_block(
                draw.integers(0, 30, size).tolist(), first_user=100 * number, seed=number, num_targets=targets.tolist()
            )
        )
    return blocks


BLOCKS = make_blocks()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset_of(tmp_path_factory.mktemp("evaluation"), evaluation=[BLOCKS[:4], BLOCKS[4:]])


def batches_of(dataset: Dataset, **changes: int) -> list[EvaluationBatch]:
    sizes = {"max_history_events": 10, "users_per_batch": 3} | changes
    return list(evaluation_batches(dataset, **sizes))


def test_batches_hold_what_the_blocks_say(dataset: Dataset) -> None:
    batches = batches_of(dataset)
    expected: list[tuple[Block, int]] = [
        (block, u) for block in BLOCKS for u, n in enumerate(np.diff(block.target_offsets)) if n
    ]
    found = [(batch, b) for batch in batches for b in range(len(batch.user))]
    assert len(found) == len(expected)
    dropped = 0
    for (batch, b), (block, u) in zip(found, expected, strict=True):
        begin, end = block.offsets[u : u + 2].tolist()
        first = max(begin, end - 10)
        dropped += first - begin
        events = slice(*batch.cu_seqlens[b : b + 2].tolist())
        targets = slice(*batch.target_offsets[b : b + 2].tolist())
        wanted = slice(*block.target_offsets[u : u + 2].tolist())
        assert batch.user[b] == block.user[u]
        assert batch.query_time[b] == block.query_time[u]
        np.testing.assert_array_equal(batch.position[events], np.arange(end - first))
        np.testing.assert_array_equal(batch.timestamp[events], block.columns["timestamp"][first:end])
        np.testing.assert_array_equal(batch.target_timestamp[targets], block.target_columns["timestamp"][wanted])
        assert set(batch.fields) == set(batch.target_fields) == {"item", "surface", "tags", "played"}
        for name in batch.fields:
            np.testing.assert_array_equal(batch.fields[name][events], block.columns[name][first:end])
            np.testing.assert_array_equal(batch.target_fields[name][targets], block.target_columns[name][wanted])
        seen = batch.seen_items[slice(*batch.seen_offsets[b : b + 2].tolist())].tolist()
        assert seen == sorted(set(block.columns["item"][begin:end].tolist()) - {0})
    assert sum(batch.num_dropped_events for batch in batches) == dropped > 0
    without = sum(int((np.diff(block.target_offsets) == 0).sum()) for block in BLOCKS)
    assert sum(batch.num_users_without_target for batch in batches) == without > 3
    assert all(len(batch.user) <= 3 for batch in batches)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("max_users", [1, 4, 9])
def test_the_first_users_are_the_same_on_any_number_of_ranks(dataset: Dataset, world: int, max_users: int) -> None:
    first = [user for batch in batches_of(dataset) for user in batch.user.tolist()]
    shares = [batches_of(dataset, max_users=max_users, rank=rank, world=world) for rank in range(world)]
    users = [user for share in shares for batch in share for user in batch.user.tolist()]
    assert 0 < len(users) <= max_users
    assert [user for user in first if user in users] == users
    assert users == [user for batch in batches_of(dataset, max_users=max_users) for user in batch.user.tolist()]
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("world", [2, 3, 4, 20])
@pytest.mark.parametrize("users_per_batch", [1, 3, 100])
def test_ranks_share_the_batches_and_all_get_as_many(dataset: Dataset, world: int, users_per_batch: int) -> None:
    alone = batches_of(dataset, users_per_batch=users_per_batch)
    shares = [batches_of(dataset, users_per_batch=users_per_batch, rank=r, world=world) for r in range(world)]
    assert {len(share) for share in shares} == {-(-len(alone) // world)}
    together = list(itertools.chain(*shares))
    for ours, theirs in itertools.zip_longest(together, alone):
        for name, value in vars(ours).items():
            same_as_nothing = theirs is None
            for key in value if isinstance(value, dict) else [None]:
                array = np.asarray(value if key is None else value[key])
                if same_as_nothing:  # an empty batch: no users, but the columns and their types
                    assert (
                        array.dtype
                        == np.asarray(getattr(alone[0], name) if key is None else getattr(alone[0], name)[key]).dtype
                    )
                    assert array.size == (1 if name.endswith(("offsets", "seqlens")) or array.ndim == 0 else 0)
                    assert not array.any()
                else:
                    other = getattr(theirs, name) if key is None else getattr(theirs, name)[key]
                    np.testing.assert_array_equal(array, other)


def test_a_split_that_is_not_there_is_refused_at_once(tmp_path: Path, dataset: Dataset) -> None:
    sizes = {"max_history_events": 10, "users_per_batch": 3}
    with pytest.raises(UserError, match="no split 'eval'"):
        evaluation_batches(write_histories(tmp_path, [3, 3], users_per_block=1), **sizes)
    with pytest.raises(UserError, match=r"no split 'valid'.*split\.validation_users"):
        evaluation_batches(dataset, split="valid", **sizes)


def without_column(block: Block, name: str) -> dict[str, Any]:
    return {key: column for key, column in block.columns.items() if key != name}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("item", 5000, "column 'item' holds ids from .* to 5000, its vocabulary ends at 4999"),
        ("item", -1, "column 'item' holds ids from -1"),
        ("tags", -2, "column 'tags' holds ids from -2"),
        ("played", 6, "column 'played' holds ids"),
        ("surface", None, "lacks the column 'surface'"),
        ("timestamp", None, "lacks the column 'timestamp'"),
        ("tags", "flat", "column 'tags' has 1 slots, dataset.json says 3"),
    ],
)
@pytest.mark.parametrize("of_targets", [False, True])
def test_ids_the_dataset_does_not_know_are_refused(
    tmp_path: Path, name: str, values: Any, message: str, of_targets: bool
) -> None:
    block = BLOCKS[2]
    columns = {key: column.copy() for key, column in (block.target_columns if of_targets else block.columns).items()}
    if values is None:
        del columns[name]
    elif values == "flat":
        columns[name] = columns[name][:, 0]
    else:
        columns[name].reshape(-1)[-1] = values
    changed = {"target_columns": columns} if of_targets else {"columns": columns}
    bad = Block(**{**vars(block), **changed})
    dataset = write_dataset_of(tmp_path, evaluation=[[BLOCKS[0], bad]])
    with pytest.raises(UserError, match=rf"shard-000000\.tar, block 1: .*{message}"):
        batches_of(dataset)


def test_a_train_block_is_no_evaluation_block(tmp_path: Path) -> None:
    dataset = write_dataset_of(tmp_path, evaluation=[[make_block([3, 4], first_user=0)]])
    with pytest.raises(UserError, match="block 0: not a block of the eval split"):
        batches_of(dataset)


def test_item_side_columns_are_no_part_of_a_batch(dataset: Dataset) -> None:
    assert FIELDS["artist"].role == "item_side"
    assert all("artist" not in batch.fields for batch in batches_of(dataset))
