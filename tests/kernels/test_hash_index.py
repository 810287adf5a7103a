"""The index of keys against one thread that inserts row after row, in Triton: on a GPU, or by its interpreter."""

import os

import pytest
import torch
from megarec_kernels.hash_index import EMPTY, HashIndex, find_rows, insert_keys, make_index, reference
from megarec_kernels.hashing import hash_torch
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.hash_index import gpu

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
EDGES = [0, -1, 1, 2**63 - 1, -(2**63), EMPTY, 2**32]


def keys_of(*parts: list[int] | int, seed: int = 0) -> Tensor:
    """Numbers in a list, and as many random ones as a number says."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.tensor(part)
        if isinstance(part, list)
        else torch.randint(-(2**63), 2**63 - 1, (part,), generator=generator)
        for part in parts
    ]
    return torch.cat(drawn).to(DEVICE)


def one_after_another(index: HashIndex) -> Tensor:
    """Linear probing as one thread does it."""
    num_slots = len(index.slots)
    slots = [EMPTY] * num_slots
    homes = (hash_torch(0, index.key_of_row[: index.num_rows]) & (num_slots - 1)).tolist()
    for row, slot in enumerate(homes):
        while slots[slot] != EMPTY:
            slot = (slot + 1) % num_slots
        slots[slot] = row
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def colliding_keys(index: HashIndex, count: int) -> Tensor:
    """Keys whose home is the last slot but one: their walk goes round the end."""
    keys = torch.arange(200 * len(index.slots), device=DEVICE)
    return keys[hash_torch(0, keys) & (len(index.slots) - 1) == len(index.slots) - 2][:count]


@pytest.mark.parametrize("path", ["plain", "kernel"])
def test_slots_are_those_of_one_thread(path: str) -> None:
    """Three batches, each with keys of the ones before; the last one fills the table."""
    index = make_index(200, device=DEVICE)
    for batch in (keys_of(EDGES, 30), keys_of(EDGES, 60, seed=1), torch.cat([colliding_keys(index, 40), keys_of(63)])):
        first = index.num_rows
        new = torch.tensor(sorted(set(batch.tolist()) - set(index.key_of_row[:first].tolist())), device=DEVICE)
        index.key_of_row[first : first + len(new)] = new
        index.num_rows += len(new)
        if path == "kernel":
            gpu.run_place_rows(index, first)
        else:
            reference.place_rows_reference(index, first)
        assert torch.equal(index.slots, one_after_another(index))
    known = index.key_of_row[: index.num_rows]
    for find in (gpu.run_find_rows, reference.find_rows_reference):
        assert torch.equal(find(index, known.flip(0)).flip(0), torch.arange(len(known), device=DEVICE))
        assert (find(index, torch.cat([colliding_keys(index, 50)[40:], keys_of(20, seed=9)])) == -1).all()
        assert find(index, known[:6].view(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert find(index, known[:0]).shape == (0,)


def test_rows_are_a_function_of_the_set_of_keys() -> None:
    keys = keys_of(EDGES, 100)
    one, other = make_index(107, device=DEVICE), make_index(107, device=DEVICE)
    rows = insert_keys(one, keys)
    again = insert_keys(other, torch.cat([keys, keys]).flip(0).view(2, -1))
    assert torch.equal(rows, keys.argsort().argsort())
    assert torch.equal(again[0].flip(0), rows) and torch.equal(again[1].flip(0), rows)
    assert torch.equal(one.slots, other.slots) and torch.equal(one.key_of_row, other.key_of_row)
    assert one.num_rows == 107  # full
    assert torch.equal(insert_keys(one, keys), rows)


def test_a_full_table_is_refused_and_unchanged() -> None:
    index = make_index(10, device=DEVICE)
    kept = insert_keys(index, keys_of(8))
    slots, keys = index.slots.clone(), index.key_of_row.clone()
    with pytest.raises(ValueError, match="3 new keys, but 2 of 10 rows are free"):
        insert_keys(index, keys_of(8, [1, 2, 3, 3]))
    assert torch.equal(index.slots, slots) and torch.equal(index.key_of_row, keys) and index.num_rows == 8
    assert torch.equal(find_rows(index, keys_of(8)), kept)
    for capacity in (0, 2**30 + 1):
        with pytest.raises(ValueError, match="capacity must be from 1 to"):
            make_index(capacity, device=DEVICE)


def test_a_slot_that_moved_is_seen() -> None:
    index = make_index(20, device=DEVICE)
    insert_keys(index, keys_of(20))
    free = int((index.slots == EMPTY).nonzero()[0])
    used = int((index.slots != EMPTY).nonzero()[0])
    index.slots[[free, used]] = index.slots[[used, free]]
    assert not torch.equal(index.slots, one_after_another(index))
