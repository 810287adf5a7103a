"""The hash of `megarec_kernels.hashing` inside a kernel, and dropout by it."""

import triton
import triton.language as tl

from megarec_kernels import hashing

GOLDEN = tl.constexpr(hashing.GOLDEN)
MIX_1 = tl.constexpr(hashing.MIX_1)
MIX_2 = tl.constexpr(hashing.MIX_2)
NEVER_SPECIALIZED = ["key", "first_word", "words_per_token", "threshold", "num_rows"]
"""Arguments that change from pack to pack: a value of them is no reason to compile again."""


@triton.jit
def keep_channels(key, token, word, words_per_token, threshold):
    """Whether channels are kept: tokens `[R, 1]` and words `[1, W]` or `[R, W]` to `[R, 4 W]` bool.

    A word is four neighbouring channels, which share the four 16-bit draws of one hash.
    """
    x = token.to(tl.uint64) * words_per_token.to(tl.uint64) + word.to(tl.uint64)
    x = x * GOLDEN + key.to(tl.uint64)
    for _ in tl.static_range(2):
        x = (x ^ (x >> 30)) * MIX_1
        x = (x ^ (x >> 27)) * MIX_2
        x = x ^ (x >> 31)
    low, high = x.to(tl.uint32), (x >> 32).to(tl.uint32)
    first, second = (low & 0xFFFF).to(tl.int32) >= threshold, (low >> 16).to(tl.int32) >= threshold
    third, fourth = (high & 0xFFFF).to(tl.int32) >= threshold, (high >> 16).to(tl.int32) >= threshold
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def drop_channels(
    x,
    residual,
    out,
    token,
    num_rows,
    width,
    key,
    first_word,
    words_per_token,
    threshold,
    keep_scale,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of `x keep keep_scale (+ residual)`; rows are contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = first_word + tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    number = tl.load(token + row, mask=row < num_rows, other=0)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    keep = keep_channels(key, number[:, None], word[None, :], words_per_token, threshold)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(keep, value * keep_scale, 0.0)
    if ADD:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
