"""Rows of logits: their losses and gradients in place; and the log-sum-exp of logits that are never written."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # a largest number of nothing: finite, so that differences to it are numbers
LARGEST_SHARE = tl.constexpr(1.0 - 2.0**-23)


@triton.jit
def load_negatives(
    products,
    ids,
    log_q,
    base,
    real,
    first,
    num_columns,
    target_id,
    inverse_temperature,
    shift,
    PER_ROW: tl.constexpr,
    CORRECTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Corrected logits of a block of columns, which of them are negatives, and the places of all that exist."""
    column = first + tl.arange(0, BLOCK)
    inside = real[:, None] & (column < num_columns)[None, :]
    value = tl.load(products + base[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = value * inverse_temperature
    if PER_ROW:
        item = tl.load(ids + base[:, None] + column[None, :], mask=inside, other=0)
    else:
        item = tl.load(ids + column, mask=column < num_columns, other=0)[None, :]
    if CORRECTION != "none":
        if PER_ROW:
            value -= tl.load(log_q + item, mask=inside, other=0.0).to(tl.float32)
        else:
            value -= tl.load(log_q + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    return value + shift[:, None], inside & (item != target_id[:, None]), inside, column


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def row_losses(
    products,
    target,
    ids,
    log_q,
    inverse_temperature,
    loss,
    num_rows,
    num_columns,
    PER_ROW: tl.constexpr,
    CORRECTION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses of rows, and `products` overwritten with their gradients for the logits.

    `PER_ROW`: the items of the columns are each row's own and the target is the first; otherwise `ids` is of all rows.
    Each lane keeps its own running maximum and sum; they are brought together once, behind the last block.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_rows
    base = row.to(tl.int64) * num_columns
    scale = tl.load(inverse_temperature).to(tl.float32)
    if PER_ROW:
        target_column = tl.zeros([ROWS], tl.int64)
        target_id = tl.load(ids + base, mask=real, other=0)
        place = target_id
    else:
        target_column = tl.load(target + row, mask=real, other=0)
        target_id = tl.load(ids + target_column)
        place = target_column
    score = tl.load(products + base + target_column, mask=real, other=0.0).to(tl.float32) * scale
    shift = tl.zeros([ROWS], tl.float32)
    if CORRECTION == "standard":
        score -= tl.load(log_q + place).to(tl.float32)
    if CORRECTION == "negatives_only":
        share = tl.exp(tl.load(log_q + place).to(tl.float32))
        shift = tl.log(1.0 - tl.minimum(share, LARGEST_SHARE))

    largest = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    count = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, num_columns, BLOCK):
        value, negative, _, _ = load_negatives(
            products, ids, log_q, base, real, first, num_columns, target_id, scale, shift, PER_ROW, CORRECTION, BLOCK
        )
        value = tl.where(negative, value, -float("inf"))
        larger = tl.maximum(largest, value)
        total = total * tl.exp(largest - larger) + tl.exp(value - larger)
        largest = larger
        if CORRECTION == "negatives_only":
            count += negative.to(tl.float32)
    top = tl.max(largest, axis=1)
    total_row = tl.sum(total * tl.exp(largest - top[:, None]), axis=1)
    if CORRECTION == "negatives_only":
        number = tl.sum(count, axis=1)
        log_sum = tl.where(number > 0, top + tl.log(tl.where(number > 0, total_row, 1.0)), score)
        # 1 - P(target) as a sigmoid: no difference of nearly equal numbers when P is close to 1.
        weight = tl.sigmoid(log_sum - tl.log(tl.maximum(number, 1.0)) - score)
        weight = tl.where(number > 0, weight, 0.0)
        target_gradient = -weight
    else:
        peak = tl.maximum(top, score)
        log_sum = peak + tl.log(total_row * tl.exp(top - peak) + tl.exp(score - peak))
        weight = tl.full([ROWS], 1.0, tl.float32)
        target_gradient = tl.exp(score - log_sum) - 1.0
    tl.store(loss + row, weight * (log_sum - score), mask=real)

    for first in range(0, num_columns, BLOCK):
        value, negative, inside, column = load_negatives(
            products, ids, log_q, base, real, first, num_columns, target_id, scale, shift, PER_ROW, CORRECTION, BLOCK
        )
        gradient = tl.where(negative, tl.exp(value - log_sum[:, None]) * weight[:, None], 0.0)
        gradient = tl.where(column[None, :] == target_column[:, None], target_gradient[:, None], gradient)
        out = products + base[:, None] + column[None, :]
        tl.store(out, gradient.to(products.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def exponentials_tile(products, log_sum, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """`products` becomes `exp(products - log_sum)`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = products + row.to(tl.int64)[:, None] * num_columns + column[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    value = tl.exp(value - tl.load(log_sum + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None])
    tl.store(place, value.to(products.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_items", "items_per_part"])
def log_sum_exp_tile(
    query,
    items,
    largest_out,
    total_out,
    num_queries,
    num_items,
    width,
    items_per_part,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Running maximum and sum of `e^(logit - maximum)` of a tile of queries over one part of the items."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    begin = tl.program_id(1).to(tl.int64) * items_per_part
    end = tl.minimum(begin + items_per_part, num_items)
    # Queries and items outside read the last one: no mask in the loop over the width.
    query_place = query + tl.minimum(row, num_queries - 1).to(tl.int64)[:, None] * width + depth[None, :]
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, COLUMNS):
        item = first + tl.arange(0, COLUMNS)
        items_place = items + tl.minimum(item, num_items - 1).to(tl.int64)[None, :] * width + depth[:, None]
        scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(0, width, DEPTH):
            if EVEN:
                left, right = tl.load(query_place + step), tl.load(items_place + step)
            else:
                left = tl.load(query_place + step, mask=(depth < width - step)[None, :], other=0.0)
                right = tl.load(items_place + step, mask=(depth < width - step)[:, None], other=0.0)
            scores = tl.dot(left, right, scores, input_precision=PRECISION)
        scores = tl.where((item < end)[None, :], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger[:, None]), axis=1)
        largest = larger
    place = tl.program_id(1).to(tl.int64) * num_queries + row
    tl.store(largest_out + place, largest, mask=row < num_queries)
    tl.store(total_out + place, total, mask=row < num_queries)
