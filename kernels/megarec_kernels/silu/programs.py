"""The gradient of a packed row, and a product with SiLU behind it."""

import triton
import triton.language as tl


@triton.jit
def gather_gradients(pointer, token_stride, head_stride, token, head, column, inside):
    """Gradients of one part of the heads: `[R, C]`, 0 outside."""
    place = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return tl.load(pointer + place[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def pack_gradients(
    uvqk,
    u_gradient,
    v_gradient,
    q_gradient,
    k_gradient,
    out,
    num_rows,
    u_token_stride,
    u_head_stride,
    v_token_stride,
    v_head_stride,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    NUM_HEADS: tl.constexpr,
    V_WIDTH: tl.constexpr,
    QK_WIDTH: tl.constexpr,
    SILU_ON_ALL: tl.constexpr,
    SILU_ON_U: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of `uvqk` from those of its four parts; a row is one head of one token.

    Each load is of those columns that are its part's: what is not is masked, and costs no traffic.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_HEADS, row % NUM_HEADS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (row < num_rows)[:, None]
    of_u = real & (column < V_WIDTH)[None, :]
    of_v = real & ((column >= V_WIDTH) & (column < 2 * V_WIDTH))[None, :]
    of_q = real & ((column >= 2 * V_WIDTH) & (column < 2 * V_WIDTH + QK_WIDTH))[None, :]
    of_k = real & ((column >= 2 * V_WIDTH + QK_WIDTH) & (column < 2 * V_WIDTH + 2 * QK_WIDTH))[None, :]
    inside = real & (column < 2 * V_WIDTH + 2 * QK_WIDTH)[None, :]
    g = gather_gradients(u_gradient, u_token_stride, u_head_stride, token, head, column, of_u)
    g += gather_gradients(v_gradient, v_token_stride, v_head_stride, token, head, column - V_WIDTH, of_v)
    g += gather_gradients(q_gradient, q_token_stride, q_head_stride, token, head, column - 2 * V_WIDTH, of_q)
    g += gather_gradients(k_gradient, k_token_stride, k_head_stride, token, head, column - 2 * V_WIDTH - QK_WIDTH, of_k)
    place = row.to(tl.int64)[:, None] * (2 * V_WIDTH + 2 * QK_WIDTH) + column[None, :]
    if SILU_ON_ALL or SILU_ON_U:
        active = inside if SILU_ON_ALL else of_u
        value = tl.load(uvqk + place, mask=active, other=0.0).to(tl.float32)
        gate = tl.sigmoid(value)
        g *= tl.where(active, gate * (1.0 + value * (1.0 - gate)), 1.0)
    tl.store(out + place, g.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def linear_silu_tile(
    x,
    weight,
    bias,
    linear,
    activated,
    num_rows,
    num_columns,
    in_width,
    x_stride,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of `linear = x weight^T + bias` and of `activated = SiLU(linear)`.

    Tiles go through `GROUP` rows of tiles before the next column, so that what is loaded is found in the second-level
    cache. `EVEN`: `DEPTH` divides `in_width`.
    """
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_columns, COLUMNS)
    in_group = GROUP * num_column_tiles
    first = (tl.program_id(0) // in_group) * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    row_tile = first + (tl.program_id(0) % in_group) % height
    column_tile = (tl.program_id(0) % in_group) // height
    row, column = row_tile * ROWS + tl.arange(0, ROWS), column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # Rows and columns outside read the last one: no mask in the loop, and what comes of them is not stored.
    x_place = x + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_place = weight + tl.minimum(column, num_columns - 1).to(tl.int64)[None, :] * weight_stride + depth[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(0, in_width, DEPTH):
        if EVEN:
            left, right = tl.load(x_place + step), tl.load(weight_place + step)
        else:
            left = tl.load(x_place + step, mask=(depth < in_width - step)[None, :], other=0.0)
            right = tl.load(weight_place + step, mask=(depth < in_width - step)[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    stored = total.to(linear.dtype.element_ty)
    value = stored.to(tl.float32)  # what the backward pass will read
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    tl.store(linear + place, stored, mask=inside)
    tl.store(activated + place, (value * tl.sigmoid(value)).to(activated.dtype.element_ty), mask=inside)
