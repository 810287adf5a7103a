"""Rows `[R, D]`, contiguous, a few to a program, each whole in its registers."""

import triton
import triton.language as tl

from megarec_kernels.dropout.programs import NEVER_SPECIALIZED, keep_channels


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def norm_rows(
    x,
    added,
    total,
    scale,
    shift,
    normed,
    mean,
    rstd,
    token,
    num_rows,
    width,
    eps,
    key,
    first_word,
    words_per_token,
    threshold,
    keep_scale,
    ADD: tl.constexpr,
    DROP: tl.constexpr,
    AFFINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`normed` of x, or of `total = x + dropout(added)` as it is stored; each row's mean and 1 / standard deviation."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        other = tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            number = tl.load(token + row, mask=row < num_rows, other=0)
            word = first_word + tl.arange(0, BLOCK // 4)
            keep = keep_channels(key, number[:, None], word[None, :], words_per_token, threshold)
            other = tl.where(keep, other * keep_scale, 0.0)
        stored = (value + other).to(total.dtype.element_ty)
        tl.store(total + place, stored, mask=inside)
        value = stored.to(tl.float32)  # what the backward pass will read
    center = tl.sum(value, axis=1) / width
    value = tl.where(inside, value - center[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    tl.store(mean + row, center, mask=row < num_rows)
    tl.store(rstd + row, inverse, mask=row < num_rows)
    value = value * inverse[:, None]
    if AFFINE:
        value = value * tl.load(scale + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        value += tl.load(shift + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + place, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def norm_rows_backward(
    x,
    gradient,
    total_gradient,
    scale,
    mean,
    rstd,
    x_gradient,
    added_gradient,
    partials,
    token,
    num_rows,
    width,
    tiles_per_program,
    key,
    first_word,
    words_per_token,
    threshold,
    keep_scale,
    ADD: tl.constexpr,
    DROP: tl.constexpr,
    AFFINE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of x (and of `added` where a part is dropped), and this program's share of those of scale and shift.

    `dx = rstd (h - mean(h) - n mean(h n)) (+ total_gradient)` with `n = (x - mean) rstd` and `h = gradient scale`.
    """
    column = tl.arange(0, BLOCK)
    weight = tl.full([BLOCK], 1.0, tl.float32)
    if AFFINE:
        weight = tl.load(scale + column, mask=column < width, other=0.0).to(tl.float32)
        scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        shift_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles_per_program):
        row = (tl.program_id(0) * tiles_per_program + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        center = tl.load(mean + row, mask=row < num_rows, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, (value - center) * inverse, 0.0)
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        if AFFINE:
            scale_sum += g * value
            shift_sum += g
        g = g * weight[None, :]
        along = tl.sum(g * value, axis=1) / width
        g = (g - (tl.sum(g, axis=1) / width)[:, None] - value * along[:, None]) * inverse
        if ADD:
            g += tl.load(total_gradient + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_gradient + place, g.to(x_gradient.dtype.element_ty), mask=inside)
        if DROP:
            number = tl.load(token + row, mask=row < num_rows, other=0)
            word = first_word + tl.arange(0, BLOCK // 4)
            keep = keep_channels(key, number[:, None], word[None, :], words_per_token, threshold)
            g = tl.where(keep, g * keep_scale, 0.0)
            tl.store(added_gradient + place, g.to(added_gradient.dtype.element_ty), mask=inside)
    if AFFINE:
        out = partials + tl.program_id(0).to(tl.int64) * 2 * width + column
        tl.store(out, tl.sum(scale_sum, axis=0), mask=column < width)
        tl.store(out + width, tl.sum(shift_sum, axis=0), mask=column < width)
