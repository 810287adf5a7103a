"""The backward kernels: one program per block of queries for their gradient, one per block of keys for theirs.

Both compute the scores again. That is seven products of a block where one pass would make five, and every gradient is
summed by one program in one order: no atomics, no locks, the same bits every time. With ATOMIC the pass over keys adds
to the gradients of queries too, five products, in an order that differs from run to run.
"""

import triton
import triton.language as tl

from megarec_kernels.hstu_attention.programs import (
    add_bias,
    add_to_distances,
    bucket_sums,
    diagonal_sums,
    key_side,
    load_rows,
    load_task,
    pair,
    query_side,
    reach_of,
    sigmoid,
    store_rows,
)


@triton.jit
def weigh(scores, FAST: tl.constexpr):
    """`SiLU(s)` and its derivative, `sigmoid(s) (1 + s (1 - sigmoid(s)))`."""
    share = sigmoid(scores, FAST)
    weights = scores * share
    return weights, share + weights * (1.0 - share)


@triton.jit
def collect(
    grad_scores,
    pairs,
    state,
    sums,
    apart,
    plain,
    GRADS: tl.constexpr,
    HAS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds a square of `grad_scores` to the gradients of the biases; `apart` is by how many blocks its sides differ.

    A square has the distances of two blocks of distances: `apart` and the one below. The neighbour that is visited
    before or after it completes one of the two, which is stored; the other is carried in `state`.
    """
    carried, by_bucket = state
    if GRADS[0]:
        if plain:
            upper, lower = diagonal_sums(grad_scores, BLOCK, KEYS_FIRST)
            if KEYS_FIRST:
                done, carried, at = carried + lower, upper, apart - 1
            else:
                done, carried, at = carried + upper, lower, apart
            distance = at * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums[0] + distance, done, mask=distance >= 0)
        elif HAS[2]:
            seen = pairs[2] if MASKED else pairs[0] >= 0
            add_to_distances(sums[0], grad_scores, pairs[0], seen)
    if GRADS[1]:
        by_bucket += bucket_sums(grad_scores, pairs[1], by_bucket.shape[0])
    return carried, by_bucket


@triton.jit
def flush(state, sums, at, plain, GRADS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the block of distances that is still carried when a range of squares ends, and carries nothing."""
    carried = state[0]
    if GRADS[0]:
        if plain:
            distance = at * BLOCK + tl.arange(0, BLOCK)
            tl.store(sums[0] + distance, carried, mask=distance >= 0)
        carried = tl.zeros([BLOCK], dtype=tl.float32)
    return carried, state[1]


@triton.jit
def visit_keys(
    grad_query,
    state,
    query,
    outer,
    bounds,
    queries,
    inputs,
    tokens,
    biases,
    sums,
    length,
    scale,
    block,
    plain,
    WIDTHS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS: tl.constexpr,
    GRADS: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds `sum_j ds_ij k_j` over the keys within `bounds`; unless MASKED, every query sees all of them."""
    for start in tl.range(bounds[0], bounds[1], KEYS):
        key = start + tl.arange(0, KEYS)
        key_rows = load_rows(inputs[0], key, inputs[1], length, WIDTHS[0], WIDTHS[1], MASKED)
        value_rows = load_rows(inputs[2], key, inputs[3], length, WIDTHS[2], WIDTHS[3], MASKED)
        scores = tl.dot(query, tl.trans(key_rows), input_precision=PRECISION) * scale
        pairs = pair(queries, key_side(key, tokens, length, HAS), biases[2], length, HAS, False, MASKED, FAST)
        scores = add_bias(scores, pairs, biases, HAS, FAST)
        _, slope = weigh(scores, FAST)
        if MASKED:
            slope = tl.where(pairs[2], slope, 0.0)
        grad_scores = tl.dot(outer, tl.trans(value_rows), input_precision=PRECISION) * slope
        grad_query = tl.dot(grad_scores.to(key_rows.dtype), key_rows, grad_query, input_precision=PRECISION)
        if GRADS[0] or GRADS[1]:
            apart = block - start // KEYS
            state = collect(grad_scores, pairs, state, sums, apart, plain, GRADS, HAS, KEYS, False, MASKED)
    return grad_query, state


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    grad_out,
    grad_q,
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
    position_sums,
    time_sums,
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
    num_distances,
    scale,
    inverse_divisor,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS: tl.constexpr,
    GRADS: tl.constexpr,
    BUCKETS: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients of ROWS queries and this program's part of those of the biases, times the divisor."""
    first, length, block, head = load_task(tasks)
    tokens = (asked + first, happened + first, seen_before + first, group_first + first, place + first)
    inputs = (k + first * k_row + head * k_head, k_row, v + first * v_row + head * v_head, v_row)
    biases = (position_bias, time_bias, cells)
    program = tl.program_id(0).to(tl.int64)
    sums = (position_sums + program * num_distances, time_sums + program * BUCKETS)
    row = block * ROWS + tl.arange(0, ROWS)
    queries = query_side(row, tokens, length, HAS)
    query = load_rows(q + first * q_row + head * q_head, row, q_row, length, WIDTHS[0], WIDTHS[1], True)
    outer = grad_out + first * grad_out_row + head * grad_out_head
    outer = load_rows(outer, row, grad_out_row, length, WIDTHS[2], WIDTHS[3], True)
    free, reach, group, end = reach_of(queries, length, ROWS, KEYS, HAS)
    plain = True
    if HAS[2]:
        plain = tl.load(spans + program * 5) >= end
    H_BLOCK: tl.constexpr = WIDTHS[1]
    total = tl.zeros([ROWS, H_BLOCK], dtype=tl.float32)
    state = (tl.zeros([KEYS], dtype=tl.float32), tl.zeros([BUCKETS], dtype=tl.float32))
    total, state = visit_keys(
        total, state, query, outer, (0, free), queries, inputs, tokens, biases, sums, length, scale, block, plain,
        WIDTHS, KEYS, HAS, GRADS, False, FAST, PRECISION,
    )  # fmt: skip
    total, state = visit_keys(
        total, state, query, outer, (free, reach), queries, inputs, tokens, biases, sums, length, scale, block, plain,
        WIDTHS, KEYS, HAS, GRADS, True, FAST, PRECISION,
    )  # fmt: skip
    if HAS[2]:
        if group > reach:
            state = flush(state, sums, block - tl.cdiv(reach, KEYS), plain, GRADS, KEYS)
        total, state = visit_keys(
            total, state, query, outer, (group, end), queries, inputs, tokens, biases, sums, length, scale, block,
            plain, WIDTHS, KEYS, HAS, GRADS, True, FAST, PRECISION,
        )  # fmt: skip
    if GRADS[1]:
        tl.store(sums[1] + tl.arange(0, BUCKETS), state[1])
    grad_query = grad_q + first * grad_q_row + head * grad_q_head
    store_rows(grad_query, row, grad_q_row, length, total * (scale * inverse_divisor), WIDTHS[0], WIDTHS[1])


@triton.jit
def visit_queries(
    grad_keys,
    grad_values,
    state,
    key_rows,
    value_rows,
    bounds,
    keys,
    inputs,
    tokens,
    biases,
    grads,
    sums,
    length,
    scale,
    block,
    plain,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS: tl.constexpr,
    GRADS: tl.constexpr,
    ATOMIC: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds `sum_i ds_ij q_i` and `sum_i w_ij g_i` over the queries within `bounds`; pairs are `[keys, rows]`."""
    for start in tl.range(bounds[0], bounds[1], ROWS):
        row = start + tl.arange(0, ROWS)
        query_rows = load_rows(inputs[0], row, inputs[1], length, WIDTHS[0], WIDTHS[1], MASKED)
        outer_rows = load_rows(inputs[2], row, inputs[3], length, WIDTHS[2], WIDTHS[3], MASKED)
        scores = tl.dot(key_rows, tl.trans(query_rows), input_precision=PRECISION) * scale
        pairs = pair(query_side(row, tokens, length, HAS), keys, biases[2], length, HAS, True, MASKED, FAST)
        scores = add_bias(scores, pairs, biases, HAS, FAST)
        weights, slope = weigh(scores, FAST)
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
        if GRADS[0] or GRADS[1]:
            apart = start // ROWS - block
            state = collect(grad_scores, pairs, state, sums, apart, plain, GRADS, HAS, ROWS, True, MASKED)
    return grad_keys, grad_values, state


@triton.jit
def keys_kernel(
    q,
    k,
    v,
    grad_out,
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
    position_sums,
    time_sums,
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
    num_distances,
    scale,
    inverse_divisor,
    WIDTHS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS: tl.constexpr,
    GRADS: tl.constexpr,
    BUCKETS: tl.constexpr,
    ATOMIC: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the gradients of KEYS keys and values; with ATOMIC adds to those of queries (times divisor / scale) too."""
    first, length, block, head = load_task(tasks)
    tokens = (asked + first, happened + first, seen_before + first, group_first + first, place + first)
    inputs = (
        q + first * q_row + head * q_head,
        q_row,
        grad_out + first * grad_out_row + head * grad_out_head,
        grad_out_row,
    )
    grads = (grad_q + first * grad_q_row + head * grad_q_head, grad_q_row)
    biases = (position_bias, time_bias, cells)
    program = tl.program_id(0).to(tl.int64)
    sums = (position_sums + program * num_distances, time_sums + program * BUCKETS)
    key = block * KEYS + tl.arange(0, KEYS)
    keys = key_side(key, tokens, length, HAS)
    key_rows = load_rows(k + first * k_row + head * k_head, key, k_row, length, WIDTHS[0], WIDTHS[1], True)
    value_rows = load_rows(v + first * v_row + head * v_head, key, v_row, length, WIDTHS[2], WIDTHS[3], True)
    H_BLOCK: tl.constexpr = WIDTHS[1]
    HV_BLOCK: tl.constexpr = WIDTHS[3]
    grad_keys = tl.zeros([KEYS, H_BLOCK], dtype=tl.float32)
    grad_values = tl.zeros([KEYS, HV_BLOCK], dtype=tl.float32)
    state = (tl.zeros([ROWS], dtype=tl.float32), tl.zeros([BUCKETS], dtype=tl.float32))
    if HAS[2]:
        plain = tl.load(spans + program * 5) >= length
        for part in tl.static_range(2):
            begin = tl.load(spans + program * 5 + 1 + 2 * part).to(tl.int32)
            end = tl.load(spans + program * 5 + 2 + 2 * part).to(tl.int32)
            grad_keys, grad_values, state = visit_queries(
                grad_keys, grad_values, state, key_rows, value_rows, (begin, end), keys, inputs, tokens, biases, grads,
                sums, length, scale, block, plain, WIDTHS, ROWS, HAS, GRADS, ATOMIC, True, FAST, PRECISION,
            )  # fmt: skip
            if end > begin:
                state = flush(state, sums, tl.cdiv(end, ROWS) - 1 - block, plain, GRADS, ROWS)
    else:
        begin = block * KEYS // ROWS * ROWS
        free = tl.minimum(tl.cdiv(block * KEYS + KEYS, ROWS) * ROWS, length)
        rest = tl.maximum(free, length // ROWS * ROWS)
        grad_keys, grad_values, state = visit_queries(
            grad_keys, grad_values, state, key_rows, value_rows, (begin, free), keys, inputs, tokens, biases, grads,
            sums, length, scale, block, True, WIDTHS, ROWS, HAS, GRADS, ATOMIC, True, FAST, PRECISION,
        )  # fmt: skip
        grad_keys, grad_values, state = visit_queries(
            grad_keys, grad_values, state, key_rows, value_rows, (free, rest), keys, inputs, tokens, biases, grads,
            sums, length, scale, block, True, WIDTHS, ROWS, HAS, GRADS, ATOMIC, False, FAST, PRECISION,
        )  # fmt: skip
        grad_keys, grad_values, state = visit_queries(
            grad_keys, grad_values, state, key_rows, value_rows, (rest, length), keys, inputs, tokens, biases, grads,
            sums, length, scale, block, True, WIDTHS, ROWS, HAS, GRADS, ATOMIC, True, FAST, PRECISION,
        )  # fmt: skip
        state = flush(state, sums, tl.cdiv(length, ROWS) - 1 - block, True, GRADS, ROWS)
    if GRADS[1]:
        tl.store(sums[1] + tl.arange(0, BUCKETS), state[1])
    key_gradient = grad_k + first * grad_k_row + head * grad_k_head
    store_rows(key_gradient, key, grad_k_row, length, grad_keys * (scale * inverse_divisor), WIDTHS[0], WIDTHS[1])
    value_gradient = grad_v + first * grad_v_row + head * grad_v_head
    store_rows(value_gradient, key, grad_v_row, length, grad_values * inverse_divisor, WIDTHS[2], WIDTHS[3])
