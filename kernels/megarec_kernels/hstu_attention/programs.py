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
def store_rows(base, row, row_stride, length, values, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr):
    """The way back of `load_rows`, in the dtype of `base`."""
    channel = tl.arange(0, WIDTH_BLOCK)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * row_stride + channel
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(row < length)[:, None] & (channel < WIDTH))


@triton.jit
def sigmoid(scores, FAST: tl.constexpr):
    """`1 / (1 + e^-s)`; FAST as `(1 + tanh(s / 2)) / 2` with one instruction for tanh, off by at most 2^-12."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * scores], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * tanh + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-scores))


@triton.jit
def look_up(table, place, FAST: tl.constexpr):
    """`table[place]` as int32 or fp32, or two int32 as one int64. FAST past the loop's pipeline.

    Triton would bring every element of a block through shared memory ahead of time, which then holds nothing else.
    """
    if FAST:
        pointers = (table + place).to(tl.int64)
        if table.dtype.element_ty == tl.int64:
            found = tl.inline_asm_elementwise(
                "ld.global.nc.b64 $0, [$1];", "=l,l", [pointers], dtype=tl.int64, is_pure=True, pack=1
            )
        else:
            found = tl.inline_asm_elementwise(
                "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], dtype=tl.float32, is_pure=True, pack=1
            )
    else:
        found = tl.load(table + place)
    return found


@triton.jit
def bucket_of(seconds, cells, FAST: tl.constexpr):
    """`clamp(int(log(max(1, |seconds|)) / 0.301), 0, num_buckets)` of int32, exactly (`work.time_cells`)."""
    seconds = tl.maximum(tl.abs(seconds), 1)
    cell = (seconds.to(tl.float32).to(tl.int32, bitcast=True) >> 20) - 1016  # 127 << 3: the bits of 1.0
    packed = look_up(cells, cell, FAST)
    return packed.to(tl.int32) + (seconds >= (packed >> 32).to(tl.int32)).to(tl.int32)


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
        distance = tl.maximum(tl.expand_dims(queries[4], ROW) - tl.expand_dims(keys[2], KEY), 0)
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
    """Adds `position_bias[distance]` and `time_bias[bucket]`."""
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
