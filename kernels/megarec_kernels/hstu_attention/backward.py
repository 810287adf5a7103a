"""The backward kernels: one program per block of queries for their gradient, one per block of keys for theirs.

Both compute the scores again. That is seven products of a block where one pass would make five, and every gradient is
summed by one program in one order: no atomics, no locks, the same bits every time. With ATOMIC the pass over keys adds
to the gradients of queries too, five products, in an order that differs from run to run. The gradients of the biases
have a third pass of two products: what it does with a square of pairs would stop the others' loops.
"""

import triton
import triton.language as tl

from megarec_kernels.hstu_attention.programs import (
    add_bias,
    add_to_distances,
    bucket_sums,
    diagonal_sums,
    key_side,
    load_block,
    load_rows,
    load_task,
    pair,
    query_side,
    reach_of,
    silu_and_slope,
    source_of,
    store_rows,
)


@triton.jit
def visit_keys(
    grad_query,
    query,
    outer,
    bounds,
    queries,
    inputs,
    tokens,
    biases,
    length,
    half_scale,
    WIDTHS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds `sum_j ds_ij k_j` over the keys within `bounds`; unless MASKED, every query sees all of them."""
    for start in tl.range(bounds[0], bounds[1], KEYS):
        key = start + tl.arange(0, KEYS)
        key_rows = load_block(inputs[0], start, length, WIDTHS[0], WIDTHS[1], KEYS, MASKED, TMA)
        value_rows = load_block(inputs[1], start, length, WIDTHS[2], WIDTHS[3], KEYS, MASKED, TMA)
        scores = tl.dot(query, tl.trans(key_rows), input_precision=PRECISION) * half_scale
        pairs = pair(queries, key_side(key, tokens, length, HAS), biases[2], length, HAS, False, MASKED, FAST)
        scores = add_bias(scores, pairs, biases, HAS, FAST)
        _, slope = silu_and_slope(scores, FAST)
        if MASKED:
            slope = tl.where(pairs[2], slope, 0.0)
        grad_scores = tl.dot(outer, tl.trans(value_rows), input_precision=PRECISION) * slope
        grad_query = tl.dot(grad_scores.to(key_rows.dtype), key_rows, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    grad_out,
    k_rows,
    v_rows,
    grad_q,
    tasks,
    position_bias,
    time_bias,
    cells,
    asked,
    happened,
    seen_before,
    group_first,
    place,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_out_row,
    grad_out_head,
    grad_q_row,
    grad_q_head,
    half_scale,
    inverse_divisor,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS: tl.constexpr,
    TMA: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients of ROWS queries."""
    first, length, block, head = load_task(tasks)
    tokens = (asked + first, happened + first, seen_before + first, group_first + first, place + first)
    inputs = (
        source_of(k, k_rows, k_row, k_head, first, head),
        source_of(v, v_rows, v_row, v_head, first, head),
    )
    biases = (position_bias, time_bias, cells)
    row = block * ROWS + tl.arange(0, ROWS)
    queries = query_side(row, tokens, length, HAS)
    query = load_rows(q + first * q_row + head * q_head, row, q_row, length, WIDTHS[0], WIDTHS[1], True)
    outer = grad_out + first * grad_out_row + head * grad_out_head
    outer = load_rows(outer, row, grad_out_row, length, WIDTHS[2], WIDTHS[3], True)
    free, reach, group, end = reach_of(queries, length, KEYS, HAS)
    H_BLOCK: tl.constexpr = WIDTHS[1]
    total = tl.zeros([ROWS, H_BLOCK], dtype=tl.float32)
    total = visit_keys(
        total, query, outer, (0, free), queries, inputs, tokens, biases, length, half_scale,
        WIDTHS, KEYS, HAS, False, TMA, FAST, PRECISION,
    )  # fmt: skip
    total = visit_keys(
        total, query, outer, (free, reach), queries, inputs, tokens, biases, length, half_scale,
        WIDTHS, KEYS, HAS, True, TMA, FAST, PRECISION,
    )  # fmt: skip
    if HAS[2]:
        total = visit_keys(
            total, query, outer, (group, end), queries, inputs, tokens, biases, length, half_scale,
            WIDTHS, KEYS, HAS, True, TMA, FAST, PRECISION,
        )  # fmt: skip
    grad_query = grad_q + first * grad_q_row + head * grad_q_head
    store_rows(grad_query, row, grad_q_row, length, total * (2.0 * half_scale * inverse_divisor), WIDTHS[0], WIDTHS[1])


@triton.jit
def visit_queries(
    grad_keys,
    grad_values,
    key_rows,
    value_rows,
    bounds,
    keys,
    inputs,
    tokens,
    biases,
    grads,
    length,
    half_scale,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS: tl.constexpr,
    ATOMIC: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds `sum_i ds_ij q_i` and `sum_i w_ij g_i` over the queries within `bounds`; pairs are `[keys, rows]`."""
    for start in tl.range(bounds[0], bounds[1], ROWS):
        row = start + tl.arange(0, ROWS)
        query_rows = load_block(inputs[0], start, length, WIDTHS[0], WIDTHS[1], ROWS, MASKED, TMA)
        outer_rows = load_block(inputs[1], start, length, WIDTHS[2], WIDTHS[3], ROWS, MASKED, TMA)
        scores = tl.dot(key_rows, tl.trans(query_rows), input_precision=PRECISION) * half_scale
        pairs = pair(query_side(row, tokens, length, HAS), keys, biases[2], length, HAS, True, MASKED, FAST)
        scores = add_bias(scores, pairs, biases, HAS, FAST)
        weights, slope = silu_and_slope(scores, FAST)
        if MASKED:
            weights, slope = tl.where(pairs[2], weights, 0.0), tl.where(pairs[2], slope, 0.0)
        grad_values = tl.dot(weights.to(outer_rows.dtype), outer_rows, grad_values, input_precision=PRECISION)
        grad_scores = tl.dot(value_rows, tl.trans(outer_rows), input_precision=PRECISION) * slope
        grad_narrow = grad_scores.to(query_rows.dtype)
        grad_keys = tl.dot(grad_narrow, query_rows, grad_keys, input_precision=PRECISION)
        if ATOMIC:
            grad_query = tl.dot(tl.trans(grad_narrow), key_rows, input_precision=PRECISION)
            channel = tl.arange(0, WIDTHS[1])[None, :]
            pointers = grads[0] + row.to(tl.int64)[:, None] * grads[1] + channel
            tl.atomic_add(pointers, grad_query, mask=(row < length)[:, None] & (channel < WIDTHS[0]), sem="relaxed")
    return grad_keys, grad_values


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    grad_out,
    q_rows,
    grad_out_rows,
    grad_q,
    grad_k,
    grad_v,
    tasks,
    spans,
    position_bias,
    time_bias,
    cells,
    asked,
    happened,
    seen_before,
    group_first,
    place,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_out_row,
    grad_out_head,
    grad_q_row,
    grad_q_head,
    grad_k_row,
    grad_k_head,
    grad_v_row,
    grad_v_head,
    half_scale,
    inverse_divisor,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS: tl.constexpr,
    ATOMIC: tl.constexpr,
    TMA: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients of KEYS keys and values; with ATOMIC adds to those of queries too, times divisor / scale."""
    first, length, block, head = load_task(tasks)
    tokens = (asked + first, happened + first, seen_before + first, group_first + first, place + first)
    inputs = (
        source_of(q, q_rows, q_row, q_head, first, head),
        source_of(grad_out, grad_out_rows, grad_out_row, grad_out_head, first, head),
    )
    grads = (grad_q + first * grad_q_row + head * grad_q_head, grad_q_row)
    biases = (position_bias, time_bias, cells)
    key = block * KEYS + tl.arange(0, KEYS)
    keys = key_side(key, tokens, length, HAS)
    key_rows = load_rows(k + first * k_row + head * k_head, key, k_row, length, WIDTHS[0], WIDTHS[1], True)
    value_rows = load_rows(v + first * v_row + head * v_head, key, v_row, length, WIDTHS[2], WIDTHS[3], True)
    H_BLOCK: tl.constexpr = WIDTHS[1]
    HV_BLOCK: tl.constexpr = WIDTHS[3]
    grad_keys = tl.zeros([KEYS, H_BLOCK], dtype=tl.float32)
    grad_values = tl.zeros([KEYS, HV_BLOCK], dtype=tl.float32)
    if HAS[2]:
        span = spans + tl.program_id(0) * 4
        for part in tl.static_range(2):
            bounds = (tl.load(span + 2 * part).to(tl.int32), tl.load(span + 2 * part + 1).to(tl.int32))
            grad_keys, grad_values = visit_queries(
                grad_keys, grad_values, key_rows, value_rows, bounds, keys, inputs, tokens, biases, grads, length,
                half_scale, WIDTHS, ROWS, HAS, ATOMIC, True, TMA, FAST, PRECISION,
            )  # fmt: skip
    else:
        begin = block * KEYS // ROWS * ROWS
        free = tl.minimum(tl.cdiv(block * KEYS + KEYS, ROWS) * ROWS, length)
        rest = tl.maximum(free, length // ROWS * ROWS)
        grad_keys, grad_values = visit_queries(
            grad_keys, grad_values, key_rows, value_rows, (begin, free), keys, inputs, tokens, biases, grads, length,
            half_scale, WIDTHS, ROWS, HAS, ATOMIC, True, TMA, FAST, PRECISION,
        )  # fmt: skip
        grad_keys, grad_values = visit_queries(
            grad_keys, grad_values, key_rows, value_rows, (free, rest), keys, inputs, tokens, biases, grads, length,
            half_scale, WIDTHS, ROWS, HAS, ATOMIC, False, TMA, FAST, PRECISION,
        )  # fmt: skip
        grad_keys, grad_values = visit_queries(
            grad_keys, grad_values, key_rows, value_rows, (rest, length), keys, inputs, tokens, biases, grads, length,
            half_scale, WIDTHS, ROWS, HAS, ATOMIC, True, TMA, FAST, PRECISION,
        )  # fmt: skip
    key_gradient = grad_k + first * grad_k_row + head * grad_k_head
    store_rows(
        key_gradient, key, grad_k_row, length, grad_keys * (2.0 * half_scale * inverse_divisor), WIDTHS[0], WIDTHS[1]
    )
    value_gradient = grad_v + first * grad_v_row + head * grad_v_head
    store_rows(value_gradient, key, grad_v_row, length, grad_values * inverse_divisor, WIDTHS[2], WIDTHS[3])


@triton.jit
def collect_squares(
    carried,
    by_bucket,
    query,
    outer,
    bounds,
    queries,
    inputs,
    tokens,
    biases,
    sums,
    length,
    half_scale,
    block,
    plain,
    WIDTHS: tl.constexpr,
    SIDE: tl.constexpr,
    HAS: tl.constexpr,
    GRADS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the `ds_ij` of a block of queries and the keys within `bounds` to the gradients of the biases.

    A square has the distances of two blocks of SIDE distances: by how many blocks its sides differ, and one less. The
    next square has the lower of the two and the one below, so that a block is whole after two squares and stored;
    `carried` is the one that is not.
    """
    for start in tl.range(bounds[0], bounds[1], SIDE):
        key = start + tl.arange(0, SIDE)
        key_rows = load_block(inputs[0], start, length, WIDTHS[0], WIDTHS[1], SIDE, MASKED, TMA)
        value_rows = load_block(inputs[1], start, length, WIDTHS[2], WIDTHS[3], SIDE, MASKED, TMA)
        scores = tl.dot(query, tl.trans(key_rows), input_precision=PRECISION) * half_scale
        pairs = pair(queries, key_side(key, tokens, length, HAS), biases[2], length, HAS, False, MASKED, FAST)
        scores = add_bias(scores, pairs, biases, HAS, FAST)
        _, slope = silu_and_slope(scores, FAST)
        if MASKED:
            slope = tl.where(pairs[2], slope, 0.0)
        grad_scores = tl.dot(outer, tl.trans(value_rows), input_precision=PRECISION) * slope
        if GRADS[0]:
            if plain:
                upper, lower = diagonal_sums(grad_scores, SIDE)
                tl.store(sums[0] + (block - start // SIDE) * SIDE + tl.arange(0, SIDE), carried + upper)
                carried = lower
            elif HAS[2]:
                add_to_distances(sums[0], grad_scores, pairs[0], pairs[2] if MASKED else pairs[0] >= 0)
        if GRADS[1]:
            by_bucket += bucket_sums(grad_scores, pairs[1], by_bucket.shape[0])
    return carried, by_bucket


@triton.jit
def biases_kernel(
    q,
    k,
    v,
    grad_out,
    k_rows,
    v_rows,
    position_sums,
    time_sums,
    tasks,
    plain_tokens,
    position_bias,
    time_bias,
    cells,
    asked,
    happened,
    seen_before,
    group_first,
    place,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    grad_out_row,
    grad_out_head,
    num_distances,
    half_scale,
    WIDTHS: tl.constexpr,
    SIDE: tl.constexpr,
    HAS: tl.constexpr,
    GRADS: tl.constexpr,
    BUCKETS: tl.constexpr,
    TMA: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes what SIDE queries give to the gradients of the biases, times the divisor: a row per program.

    The rows of `position_sums` are zero before; GRADS says which of the two biases has a gradient.
    """
    first, length, block, head = load_task(tasks)
    tokens = (asked + first, happened + first, seen_before + first, group_first + first, place + first)
    inputs = (
        source_of(k, k_rows, k_row, k_head, first, head),
        source_of(v, v_rows, v_row, v_head, first, head),
    )
    biases = (position_bias, time_bias, cells)
    program = tl.program_id(0).to(tl.int64)
    sums = (position_sums + program * num_distances, time_sums + program * BUCKETS)
    row = block * SIDE + tl.arange(0, SIDE)
    queries = query_side(row, tokens, length, HAS)
    query = load_rows(q + first * q_row + head * q_head, row, q_row, length, WIDTHS[0], WIDTHS[1], True)
    outer = grad_out + first * grad_out_row + head * grad_out_head
    outer = load_rows(outer, row, grad_out_row, length, WIDTHS[2], WIDTHS[3], True)
    free, reach, group, end = reach_of(queries, length, SIDE, HAS)
    plain = True
    if HAS[2]:
        plain = tl.load(plain_tokens + program) >= end
    carried, by_bucket = tl.zeros([SIDE], dtype=tl.float32), tl.zeros([BUCKETS], dtype=tl.float32)
    carried, by_bucket = collect_squares(
        carried, by_bucket, query, outer, (0, free), queries, inputs, tokens, biases, sums, length, half_scale, block,
        plain, WIDTHS, SIDE, HAS, GRADS, False, TMA, FAST, PRECISION,
    )  # fmt: skip
    carried, by_bucket = collect_squares(
        carried, by_bucket, query, outer, (free, reach), queries, inputs, tokens, biases, sums, length, half_scale,
        block, plain, WIDTHS, SIDE, HAS, GRADS, True, TMA, FAST, PRECISION,
    )  # fmt: skip
    if HAS[2]:
        if GRADS[0]:
            next_block = tl.cdiv(reach, SIDE)
            if plain and group > next_block * SIDE and block >= next_block:  # a gap: no square completes the carried
                tl.store(sums[0] + (block - next_block) * SIDE + tl.arange(0, SIDE), carried)
                carried = tl.zeros([SIDE], dtype=tl.float32)
        carried, by_bucket = collect_squares(
            carried, by_bucket, query, outer, (group, end), queries, inputs, tokens, biases, sums, length, half_scale,
            block, plain, WIDTHS, SIDE, HAS, GRADS, True, TMA, FAST, PRECISION,
        )  # fmt: skip
    if GRADS[1]:
        tl.store(sums[1] + tl.arange(0, BUCKETS), by_bucket)
