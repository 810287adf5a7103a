"""Rows are what is normed together: the channels of a token, or of one of its heads; each whole in the registers.

Channels of a row become places in packed tensors of heads, and words of the dropout mask of the result.
"""

import triton
import triton.language as tl

from megarec_kernels.dropout.programs import NEVER_SPECIALIZED, keep_channels


@triton.jit
def keep_part(
    number,
    group,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    key,
    first_word,
    words_per_token,
    threshold,
):
    """What is kept of part number `PART` of the result's `PARTS`, `[R, BLOCK]`; four divides the head width."""
    channel = group[:, None] * WIDTH + 4 * tl.arange(0, BLOCK // 4)[None, :]
    place = (channel // HEAD_WIDTH) * (PARTS * HEAD_WIDTH) + PART * HEAD_WIDTH + channel % HEAD_WIDTH
    return keep_channels(key, number[:, None], first_word + place // 4, words_per_token, threshold)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def gate_rows(
    u,
    attention,
    scale,
    shift,
    out,
    mean,
    rstd,
    token,
    num_rows,
    u_token_stride,
    u_head_stride,
    eps,
    key,
    first_word,
    words_per_token,
    threshold,
    keep_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    CONCAT: tl.constexpr,
    GIVEN: tl.constexpr,
    DROP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The result, and the mean and 1 / standard deviation of each row unless they are given.

    `SCALE` is none, channel or group: what has a scale and a shift. A token has `GROUPS` rows.
    """
    PARTS: tl.constexpr = 1 if CONCAT == "none" else 3
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    group, number = row % GROUPS, (row // GROUPS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = real[:, None] & (column < WIDTH)[None, :]
    channel = group[:, None] * WIDTH + column[None, :]
    head, within = channel // HEAD_WIDTH, channel % HEAD_WIDTH
    row_place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    u_place = number[:, None] * u_token_stride + head.to(tl.int64) * u_head_stride + within
    value = tl.load(attention + row_place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(u + u_place, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        center = tl.load(mean + row, mask=real, other=0.0)
        inverse = tl.load(rstd + row, mask=real, other=0.0)
    else:
        center = tl.sum(value, axis=1) / WIDTH
        spread = tl.where(inside, value - center[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(spread * spread, axis=1) / WIDTH + eps)
        tl.store(mean + row, center, mask=real)
        tl.store(rstd + row, inverse, mask=real)
    normed = (value - center[:, None]) * inverse[:, None]
    if SCALE == "channel":
        normed = normed * tl.load(scale + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        normed += tl.load(shift + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if SCALE == "group":
        normed = normed * tl.load(scale + group).to(tl.float32)[:, None]
        normed += tl.load(shift + group).to(tl.float32)[:, None]
    gated = gate * normed
    place = out + number[:, None] * (GROUPS * WIDTH * PARTS) + head * (PARTS * HEAD_WIDTH) + within
    if DROP:
        drawn = tl.load(token + number, mask=real, other=0)
    if CONCAT != "none":
        before = normed if CONCAT == "u_and_norm" else value
        if DROP:
            keep = keep_part(drawn, group, 0, 3, WIDTH, HEAD_WIDTH, BLOCK, key, first_word, words_per_token, threshold)
            gate = tl.where(keep, gate * keep_scale, 0.0)
            keep = keep_part(drawn, group, 1, 3, WIDTH, HEAD_WIDTH, BLOCK, key, first_word, words_per_token, threshold)
            before = tl.where(keep, before * keep_scale, 0.0)
        tl.store(place, gate.to(out.dtype.element_ty), mask=inside)
        tl.store(place + HEAD_WIDTH, before.to(out.dtype.element_ty), mask=inside)
    if DROP:
        keep = keep_part(
            drawn, group, PARTS - 1, PARTS, WIDTH, HEAD_WIDTH, BLOCK, key, first_word, words_per_token, threshold
        )
        gated = tl.where(keep, gated * keep_scale, 0.0)
    tl.store(place + (PARTS - 1) * HEAD_WIDTH, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def gate_rows_backward(
    gradient,
    u,
    attention,
    scale,
    shift,
    mean,
    rstd,
    u_gradient,
    attention_gradient,
    mean_gradient,
    rstd_gradient,
    partials,
    token,
    num_rows,
    tiles_per_program,
    u_token_stride,
    u_head_stride,
    key,
    first_word,
    words_per_token,
    threshold,
    keep_scale,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    CONCAT: tl.constexpr,
    GIVEN: tl.constexpr,
    DROP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients; those of scale and shift as `partials`: per program of channels, per row of groups.

    With `n = (A - mean) rstd`, h the gradient of `n scale + shift` times scale:
    `dA = rstd (h - mean(h) - n mean(h n))`, or with given statistics `dA = rstd h`, `dmean = -rstd sum(h)` and
    `drstd = sum(h n) / rstd`.
    """
    PARTS: tl.constexpr = 1 if CONCAT == "none" else 3
    column = tl.arange(0, BLOCK)
    if SCALE == "channel":
        weight = tl.load(scale + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        offset = tl.load(shift + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        shift_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tiles_per_program):
        row = (tl.program_id(0) * tiles_per_program + tile) * ROWS + tl.arange(0, ROWS)
        real = row < num_rows
        group, number = row % GROUPS, (row // GROUPS).to(tl.int64)
        inside = real[:, None] & (column < WIDTH)[None, :]
        channel = group[:, None] * WIDTH + column[None, :]
        head, within = channel // HEAD_WIDTH, channel % HEAD_WIDTH
        row_place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        u_place = number[:, None] * u_token_stride + head.to(tl.int64) * u_head_stride + within
        place = gradient + number[:, None] * (GROUPS * WIDTH * PARTS) + head * (PARTS * HEAD_WIDTH) + within
        center = tl.load(mean + row, mask=real, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=real, other=0.0)[:, None]
        normed = tl.load(attention + row_place, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, (normed - center) * inverse, 0.0)
        gate = tl.load(u + u_place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(place + (PARTS - 1) * HEAD_WIDTH, mask=inside, other=0.0).to(tl.float32)
        if DROP:
            drawn = tl.load(token + number, mask=real, other=0)
            keep = keep_part(
                drawn, group, PARTS - 1, PARTS, WIDTH, HEAD_WIDTH, BLOCK, key, first_word, words_per_token, threshold
            )
            g = tl.where(keep, g * keep_scale, 0.0)
        if SCALE == "channel":
            gate_g = g * (normed * weight + offset)
        elif SCALE == "group":
            weight = tl.load(scale + group).to(tl.float32)[:, None]
            gate_g = g * (normed * weight + tl.load(shift + group).to(tl.float32)[:, None])
        else:
            gate_g = g * normed
        g = g * gate
        if CONCAT != "none":
            of_u = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            before = tl.load(place + HEAD_WIDTH, mask=inside, other=0.0).to(tl.float32)
            if DROP:
                keep = keep_part(
                    drawn, group, 0, 3, WIDTH, HEAD_WIDTH, BLOCK, key, first_word, words_per_token, threshold
                )
                of_u = tl.where(keep, of_u * keep_scale, 0.0)
                keep = keep_part(
                    drawn, group, 1, 3, WIDTH, HEAD_WIDTH, BLOCK, key, first_word, words_per_token, threshold
                )
                before = tl.where(keep, before * keep_scale, 0.0)
            gate_g += of_u
            if CONCAT == "u_and_norm":
                g += before
        tl.store(u_gradient + row_place, gate_g.to(u_gradient.dtype.element_ty), mask=inside)
        if SCALE == "channel":
            scale_sum += g * normed
            shift_sum += g
        if SCALE == "group":
            tl.store(partials + row * 2, tl.sum(g * normed, axis=1), mask=real)
            tl.store(partials + row * 2 + 1, tl.sum(g, axis=1), mask=real)
        if SCALE != "none":
            g = g * weight
        total, along = tl.sum(g, axis=1), tl.sum(g * normed, axis=1)
        if GIVEN:
            tl.store(mean_gradient + row, -total * tl.load(rstd + row, mask=real, other=0.0), mask=real)
            tl.store(rstd_gradient + row, along / tl.load(rstd + row, mask=real, other=1.0), mask=real)
        else:
            g = g - (total / WIDTH)[:, None] - normed * (along / WIDTH)[:, None]
        g = g * inverse
        if CONCAT == "u_and_attention":
            g += before
        tl.store(attention_gradient + row_place, g.to(attention_gradient.dtype.element_ty), mask=inside)
    if SCALE == "channel":
        share = partials + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
        tl.store(share, tl.sum(scale_sum, axis=0), mask=column < WIDTH)
        tl.store(share + WIDTH, tl.sum(shift_sum, axis=0), mask=column < WIDTH)
