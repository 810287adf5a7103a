"""What the Triton kernels of HSTU attention share: rows, weights, biases, and which pairs are seen."""

import triton
import triton.language as tl


@triton.jit
def load_task(tasks):
    """The history, the block of it and the head that this program works on (`work.Work`)."""
    task = tasks + tl.program_id(0) * 4
    first = tl.load(task)
    length, block, head = tl.load(task + 1).to(tl.int32), tl.load(task + 2).to(tl.int32), tl.load(task + 3)
    return first, length, block, head


@triton.jit
def load_rows(base, row, row_stride, length, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """`[rows, WIDTH_BLOCK]`; zeros beyond WIDTH, and if MASKED in rows from `length` on, which are never read."""
    channel = tl.arange(0, WIDTH_BLOCK)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * row_stride + channel
    if MASKED:
        return tl.load(pointers, mask=(row < length)[:, None] & (channel < WIDTH), other=0.0)
    elif WIDTH == WIDTH_BLOCK:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=channel < WIDTH, other=0.0)


@triton.jit
def load_block(
    source,
    start,
    length,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """The rows from `start` on of a `source`: base, stride of rows, descriptor, and first row and column in that."""
    if TMA and not MASKED:
        return source[2].load([source[3] + start, source[4]])
    else:
        row = start + tl.arange(0, BLOCK)
        return load_rows(source[0], row, source[1], length, WIDTH, WIDTH_BLOCK, MASKED)


@triton.jit
def source_of(base, descriptor, row_stride, head_stride, first, head):
    """What `load_block` reads: the rows of one head of one history, by pointers or by a descriptor of all rows."""
    column = (head * head_stride).to(tl.int32)
    return base + first * row_stride + head * head_stride, row_stride, descriptor, first.to(tl.int32), column


@triton.jit
def store_rows(base, row, row_stride, length, values, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """The way back of `load_rows`, in the dtype of `base`."""
    channel = tl.arange(0, WIDTH_BLOCK)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * row_stride + channel
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(row < length)[:, None] & (channel < WIDTH))


@triton.jit
def silu(half, FAST: tl.constexpr):
    """`SiLU(2 h) = h (1 + tanh h)` of halved scores; FAST with one instruction for tanh, off by at most 2^-11."""
    if FAST:
        return half * fast_tanh(half) + half
    else:
        return 2.0 * half / (1.0 + tl.exp(-2.0 * half))


@triton.jit
def silu_and_slope(half, FAST: tl.constexpr):
    """`SiLU(s)` and its derivative, `sigmoid(s) + SiLU(s) (1 - sigmoid(s))`, of halved scores."""
    if FAST:
        tanh = fast_tanh(half)
        share, rest, weights = 0.5 * tanh + 0.5, 0.5 - 0.5 * tanh, half * tanh + half
    else:
        share = 1.0 / (1.0 + tl.exp(-2.0 * half))
        rest, weights = 1.0 - share, 2.0 * half * share
    return weights, weights * rest + share


@triton.jit
def fast_tanh(x):
    """The tanh of the hardware."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def look_up(table, place, FAST: tl.constexpr):
    """`table[place]` in fp32. FAST past the loop's pipeline, which would hold every element in shared memory."""
    if FAST:
        found = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [(table + place).to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        found = tl.load(table + place)
    return found


@triton.jit
def bucket_of(seconds, cells, FAST: tl.constexpr):
    """`clamp(int(log(max(1, |seconds|)) / 0.301), 0, num_buckets)` of int32, exactly (`work.time_cells`)."""
    seconds = tl.maximum(tl.abs(seconds), 1)
    cell = (seconds.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - 1016  # 127 << 3: the bits of 1.0
    if FAST:
        least, following = tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [(cells + cell).to(tl.int64)],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        packed = tl.load(cells + cell)
        least, following = packed.to(tl.int32), (packed >> 32).to(tl.int32)
    return least + (seconds >= following).to(tl.int32)


@triton.jit
def query_side(row, tokens, length, HAS: tl.constexpr):
    """What is known of queries by their number in the history: `[rows]` each, or nothing that is read."""
    asked, seen_before, group_first, place = row, row, row, row
    if HAS[1]:
        asked = tl.load(tokens[0] + row, mask=row < length, other=0)
    if HAS[2]:
        seen_before = tl.load(tokens[2] + row, mask=row < length, other=0)
        group_first = tl.load(tokens[3] + row, mask=row < length, other=length)
        place = tl.load(tokens[4] + row, mask=row < length, other=0)
    return row, asked, seen_before, group_first, place


@triton.jit
def key_side(key, tokens, length, HAS: tl.constexpr):
    """What is known of keys by their number in the history: `[keys]` each."""
    happened, place = key, key
    if HAS[1]:
        happened = tl.load(tokens[1] + key, mask=key < length, other=0)
    if HAS[2] and HAS[0]:
        place = tl.load(tokens[4] + key, mask=key < length, other=0)
    return key, happened, place


@triton.jit
def pair(
    queries, keys, cells, length, HAS: tl.constexpr, KEYS_FIRST: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr
):
    """Distance, time bucket and whether it is seen of every pair, `[rows, keys]` or, KEYS_FIRST, `[keys, rows]`."""
    ROW: tl.constexpr = 0 if KEYS_FIRST else 1
    KEY: tl.constexpr = 1 if KEYS_FIRST else 0
    row, key = tl.expand_dims(queries[0], ROW), tl.expand_dims(keys[0], KEY)
    distance, bucket, seen = 0, 0, True
    if HAS[0]:
        distance = tl.expand_dims(queries[4], ROW) - tl.expand_dims(keys[2], KEY)
        if MASKED or HAS[2]:  # elsewhere every key comes before every query
            distance = tl.maximum(distance, 0)
    if HAS[1]:
        bucket = bucket_of(tl.expand_dims(queries[1], ROW) - tl.expand_dims(keys[1], KEY), cells, FAST)
    if MASKED:
        seen = key <= row
        if HAS[2]:
            seen = seen & (key >= tl.expand_dims(queries[3], ROW)) | (key < tl.expand_dims(queries[2], ROW))
        seen = seen & (row < length) & (key < length)
    return distance, bucket, seen


@triton.jit
def add_bias(scores, pairs, biases, HAS: tl.constexpr, FAST: tl.constexpr):
    """Adds `position_bias[distance]` and `time_bias[bucket]`, halved as the scores are."""
    if HAS[0]:
        scores += look_up(biases[0], pairs[0], FAST)
    if HAS[1]:
        scores += look_up(biases[1], pairs[1], FAST)
    return scores


@triton.jit
def diagonal_sums(pairs, SIDE: tl.constexpr):
    """Sums a square of pairs by query - key = c, and by query - key = c - SIDE, for c from 0 to SIDE - 1.

    A row is turned round by its own number; diagonals then are columns, each the two it is the end and the start of.
    """
    row, c = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    turned = tl.gather(pairs, (row - c + SIDE) % SIDE, axis=1)
    return tl.sum(tl.where(c <= row, turned, 0.0), axis=0), tl.sum(tl.where(c <= row, 0.0, turned), axis=0)


@triton.jit
def add_to_distances(sums, pairs, distance, seen):
    """Adds pairs to `sums[distance]` one distance after the other, for distances that no diagonal has in common."""
    low, high = tl.min(tl.where(seen, distance, 1 << 30)), tl.max(tl.where(seen, distance, -1))
    for one in range(low, high + 1):
        found = tl.sum(tl.where(seen & (distance == one), pairs, 0.0))
        tl.store(sums + one, tl.load(sums + one) + found)


@triton.jit
def bucket_sums(pairs, bucket, BUCKETS: tl.constexpr):
    """Sums pairs by their bucket, `[BUCKETS]`; visits the buckets between the least and the greatest of the pairs."""
    number = tl.arange(0, BUCKETS)
    sums = tl.zeros([BUCKETS], dtype=tl.float32)
    for one in range(tl.min(bucket), tl.max(bucket) + 1):
        sums += tl.where(number == one, tl.sum(tl.where(bucket == one, pairs, 0.0)), 0.0)
    return sums


@triton.jit
def reach_of(queries, length, KEYS: tl.constexpr, HAS: tl.constexpr):
    """Which keys a block of queries has to visit, as bounds in keys: all see `[0, free)`; some see others.

    Those are in `[free, reach)` and, with a visibility, in `[group, end)`; neither begins within a block of keys that
    another covers.
    """
    row = queries[0]
    end = tl.minimum(tl.max(row) + 1, length)
    if HAS[2]:
        is_row = row < length
        free = tl.min(tl.where(is_row, queries[2], length)) // KEYS * KEYS
        reach = tl.max(queries[2])
        group = tl.maximum(tl.min(queries[3]) // KEYS * KEYS, tl.cdiv(reach, KEYS) * KEYS)
    else:
        free = tl.min(row) // KEYS * KEYS
        reach = end
        group = end
    return free, reach, group, end
