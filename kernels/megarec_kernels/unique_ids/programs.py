"""A bitmap of ids: mark, count, rank."""

import triton
import triton.language as tl


@triton.jit
def count_bits(words):
    """How many bits of each uint32 are set (Warren, "Hacker's Delight", section 5-1)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["num"])
def mark_ids(ids, bitmap, num, BLOCK: tl.constexpr):
    """Sets the bit of every id. A popular id is marked once: later programs see the bit and leave the word alone."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(ids + place, mask=place < num, other=-1)
    bit = tl.full([BLOCK], 1, tl.int32) << (value & 31).to(tl.int32)
    word = bitmap + (value >> 5)
    seen = tl.load(word, mask=value >= 0, other=-1) & bit
    tl.atomic_or(word, bit, mask=seen == 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_words"])
def count_words(bitmap, counts, num_words, BLOCK: tl.constexpr):
    """The number of set bits of every word."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bitmap + place, mask=place < num_words, other=0).to(tl.uint32, bitcast=True)
    tl.store(counts + place, count_bits(words), mask=place < num_words)


@triton.jit(do_not_specialize=["num"])
def rank_ids(ids, bitmap, ends, unique, index, num, BLOCK: tl.constexpr):
    """The place of every id among the marked ones, and the id at that place; equal ids write the same.

    `ends` is the running sum of `count_words`.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    value = tl.load(ids + place, mask=inside, other=-1)
    used = value >= 0
    words = tl.load(bitmap + (value >> 5), mask=used, other=0).to(tl.uint32, bitcast=True)
    from_here = words >> (value & 31).to(tl.uint32)
    rank = tl.load(ends + (value >> 5), mask=used, other=0) - count_bits(from_here)
    tl.store(unique + rank, value, mask=used)
    tl.store(index + place, tl.where(used, rank, -1).to(tl.int64), mask=inside)
