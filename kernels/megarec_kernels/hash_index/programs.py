"""Linear probing by many threads at once, with the slots that one thread would have left."""

import triton
import triton.language as tl

from megarec_kernels.programs import hash_bits


@triton.jit(do_not_specialize=["num", "last_slot"])
def probe_slots(slots, key_of_row, keys, found, num, last_slot, EMPTY: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the row of each key, or -1. Slots are walked until the key or an empty slot, which there always is."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    going = place < num
    key = tl.load(keys + place, mask=going, other=0)
    slot = (hash_bits(tl.zeros([1], tl.int64), key) & last_slot.to(tl.uint64)).to(tl.int32)
    result = tl.full([BLOCK], -1, tl.int64)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        row = tl.load(slots + slot, mask=going, other=EMPTY)
        going = going & (row != EMPTY)
        hit = going & (tl.load(key_of_row + row, mask=going, other=0) == key)
        result = tl.where(hit, row.to(tl.int64), result)
        going = going & (result < 0)
        slot = (slot + 1) & last_slot
    tl.store(found + place, result, mask=place < num)


@triton.jit(do_not_specialize=["first", "num", "last_slot"])
def place_rows(slots, key_of_row, first, num, last_slot, EMPTY: tl.constexpr, BLOCK: tl.constexpr):
    """Puts rows into slots. The lower of two rows keeps a slot, the higher one, newcomer or not, goes on.

    One atomic minimum does both: what it returns is the occupant. The rows that ever reach a slot are those whose home
    it is and all but the lowest that reach the slot before; so the outcome depends on no order.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    going = place < num
    row = first + place
    key = tl.load(key_of_row + row, mask=going, other=0)
    slot = (hash_bits(tl.zeros([1], tl.int64), key) & last_slot.to(tl.uint64)).to(tl.int32)
    while tl.max(going.to(tl.int32), axis=0) > 0:
        occupant = tl.atomic_min(slots + slot, row, mask=going, sem="relaxed")
        row = tl.maximum(row, tl.where(going, occupant, EMPTY))
        going = going & (row != EMPTY)
        slot = (slot + 1) & last_slot
