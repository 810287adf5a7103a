"""The forward kernel: one program per block of queries of one head of one history."""

import triton
import triton.language as tl

from megarec_kernels.hstu_attention.programs import (
    add_bias,
    key_side,
    load_block,
    load_rows,
    load_task,
    pair,
    query_side,
    reach_of,
    silu,
    source_of,
    store_rows,
)


@triton.jit
def visit_keys(
    total,
    query,
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
    """Adds `sum_j w_ij v_j` over the keys within `bounds` to `total`; unless MASKED, every query sees all of them."""
    for start in tl.range(bounds[0], bounds[1], KEYS):
        key = start + tl.arange(0, KEYS)
        key_rows = load_block(inputs[0], start, length, WIDTHS[0], WIDTHS[1], KEYS, MASKED, TMA)
        scores = tl.dot(query, tl.trans(key_rows), input_precision=PRECISION) * half_scale
        pairs = pair(queries, key_side(key, tokens, length, HAS), biases[2], length, HAS, False, MASKED, FAST)
        scores = add_bias(scores, pairs, biases, HAS, FAST)
        weights = silu(scores, FAST)
        if MASKED:
            weights = tl.where(pairs[2], weights, 0.0)
        value_rows = load_block(inputs[1], start, length, WIDTHS[2], WIDTHS[3], KEYS, MASKED, TMA)
        total = tl.dot(weights.to(value_rows.dtype), value_rows, total, input_precision=PRECISION)
    return total


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    k_rows,
    v_rows,
    out,
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
    out_row,
    out_head,
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
    """Writes the outputs of ROWS queries. The keys that all of them see come first and cost no mask.

    WIDTHS are of queries and keys, rounded up to a power of two, of values, likewise; HAS says whether there are a
    position bias, a time bias and a visibility.
    """
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
    free, reach, group, end = reach_of(queries, length, KEYS, HAS)
    HV_BLOCK: tl.constexpr = WIDTHS[3]
    total = tl.zeros([ROWS, HV_BLOCK], dtype=tl.float32)
    total = visit_keys(
        total, query, (0, free), queries, inputs, tokens, biases, length, half_scale,
        WIDTHS, KEYS, HAS, False, TMA, FAST, PRECISION,
    )  # fmt: skip
    total = visit_keys(
        total, query, (free, reach), queries, inputs, tokens, biases, length, half_scale,
        WIDTHS, KEYS, HAS, True, TMA, FAST, PRECISION,
    )  # fmt: skip
    if HAS[2]:
        total = visit_keys(
            total, query, (group, end), queries, inputs, tokens, biases, length, half_scale,
            WIDTHS, KEYS, HAS, True, TMA, FAST, PRECISION,
        )  # fmt: skip
    store_rows(
        out + first * out_row + head * out_head, row, out_row, length, total * inverse_divisor, WIDTHS[2], WIDTHS[3]
    )
