"""Every epoch brings the blocks, the windows of a block and the packs of a pool in another order."""

from pathlib import Path

from megarec.data.block import Block
from megarec.data.dataset import Dataset
from megarec.data.evaluation import evaluation_batches
from megarec.data.packs import Pack, PackRule, cut_windows
from megarec.data.pools import fill_pool
from megarec.data.stream import StreamConfig, TrainStream
from tests.data.small_datasets import make_block, write_dataset_of, write_histories

EPOCHS = 4


def packs_by_epoch(dataset: Dataset, *, pool_blocks: int) -> list[list[Pack]]:
    config = StreamConfig(tokens_per_pack=32, max_history_events=8, lanes=1, pool_blocks=pool_blocks, seed=3)
    stream = TrainStream(dataset, config, lanes=[0])
    epochs: list[list[Pack]] = [[] for _ in range(EPOCHS)]
    while True:
        pack = stream.next_step()[0]
        if pack.epoch == EPOCHS:
            stream.close()
            return epochs
        epochs[pack.epoch].append(pack)


def test_blocks_come_in_another_order(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, [9] * 64, users_per_block=4)  # a block fills a pack: nothing is carried
    orders = [[int(pack.user[0]) // 4 for pack in packs] for packs in packs_by_epoch(dataset, pool_blocks=1)]
    assert all(sorted(order) == list(range(16)) for order in orders)
    assert len({tuple(order) for order in orders}) == EPOCHS


def test_windows_of_one_block_are_mixed_anew(tmp_path: Path) -> None:
    dataset = write_histories(tmp_path, [9] * 64, users_per_block=64)
    mixed = [frozenset(frozenset(p.user.tolist()) for p in packs) for packs in packs_by_epoch(dataset, pool_blocks=1)]
    assert len(set(mixed)) == EPOCHS


def test_packs_of_a_pool_are_shuffled() -> None:
    rule = PackRule(num_events=32, max_targets=8, stride=0, keep_last_event=False)
    windows, _ = cut_windows(make_block([9, *[5] * 95], first_user=0), epoch=0, number=0, rule=rule)
    places = []
    for key in range(8):
        packs = fill_pool([windows], carried=None, rule=rule, key=key).packs
        places += [number for number, pack in enumerate(packs) if 0 in pack]  # user 0 is the longest, so dealt first
    assert len(places) == 8 and len(set(places)) > 1


def test_an_unknown_item_is_never_seen(tmp_path: Path) -> None:
    block = make_block([3, 2], first_user=0, num_targets=[1, 1])
    block.columns["item"][:] = [0, 4, 0, 0, 9]
    dataset = write_dataset_of(
        tmp_path, train=[[Block(user=block.user, offsets=block.offsets, columns=block.columns)]], evaluation=[[block]]
    )
    (batch,) = evaluation_batches(dataset, max_history_events=5, users_per_batch=5)
    assert batch.seen_items.tolist() == [4, 9]
    assert batch.seen_offsets.tolist() == [0, 1, 2]
