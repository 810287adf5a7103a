"""Kernels on rows of tables. A program holds whole rows: `[ROWS, BLOCK]`, BLOCK at least the width."""

import triton
import triton.language as tl

from megarec_kernels.programs import hash_bits

NEVER_SPECIALIZED = ["num", "key", "row_stride", "row_offset"]
"""Arguments that change from step to step or rank to rank: a value of them is no reason to compile again."""
UPDATE_ARGUMENTS = (
    "mean",
    "square",
    "scale",
    "lr",
    "keep",
    "weight1",
    "weight2",
    "correction1",
    "root_correction2",
    "eps",
    "key",
    "row_stride",
    "row_offset",
)
"""What a kernel is told of an optimizer; None where sums are only added."""


@triton.jit
def load_vectors(base, row, inside, width, BLOCK: tl.constexpr):
    """`[rows, BLOCK]` fp32; zeros beyond the width and where not `inside`, which is never read."""
    column = tl.arange(0, BLOCK)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * width + column
    return tl.load(pointers, mask=inside[:, None] & (column < width), other=0.0).to(tl.float32)


@triton.jit
def store_vectors(base, row, inside, width, vectors, BLOCK: tl.constexpr):
    """The way back, in the dtype of `base`."""
    column = tl.arange(0, BLOCK)[None, :]
    pointers = base + row.to(tl.int64)[:, None] * width + column
    tl.store(pointers, vectors.to(base.dtype.element_ty), mask=inside[:, None] & (column < width))


@triton.jit(do_not_specialize=["num"])
def sum_slots(table, index, out, num, num_slots, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the sums of ROWS bags; slots of -1 are not read."""
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for slot in range(num_slots):
        row = tl.load(index + bag * num_slots + slot, mask=bag < num, other=-1)
        total += load_vectors(table, row, row >= 0, width, BLOCK)
    store_vectors(out, bag, bag < num, width, total, BLOCK)


@triton.jit(do_not_specialize=["num"])
def find_starts(number, starts, num, BLOCK: tl.constexpr):
    """Where each segment begins. `number` rises by 1 at each first place of a segment, from 0 for what is in none."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num
    own = tl.load(number + place, mask=inside, other=0)
    before = tl.load(number + place - 1, mask=inside & (place > 0), other=0)
    tl.store(starts + own - 1, place, mask=inside & (own != before))
    tl.store(starts + own, num + tl.zeros_like(place), mask=place == num - 1)


@triton.jit
def decay_to(old, new, weight):
    """`torch.lerp(old, new, weight)`, by its formula."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def divide(x, y):
    """`x / y` rounded as IEEE says; Triton's own operator may be off by two units in the last place."""
    return tl.div_rn(x, tl.zeros_like(x) + y)


@triton.jit
def round_at_random(vectors, row, key, width, BLOCK: tl.constexpr):
    """fp32 that bf16 holds exactly: 16 random bits are added to the 16 that bf16 lacks, and both cut off. NaN stays."""
    counters = row.to(tl.int64)[:, None] * width + tl.arange(0, BLOCK)[None, :]
    noise = (hash_bits(key, counters) & 0xFFFF).to(tl.int32)
    rounded = ((vectors.to(tl.int32, bitcast=True) + noise) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(vectors == vectors, rounded, vectors)  # one more than a NaN of all bits is a zero


@triton.jit
def finish_rows(
    total,
    row,
    inside,
    values,
    mean,
    square,
    scale,
    lr,
    keep,
    weight1,
    weight2,
    correction1,
    root_correction2,
    eps,
    key,
    row_stride,
    row_offset,
    width,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What becomes of the summed gradients `[rows, BLOCK]` of distinct rows: added to `values`, or their update."""
    old = load_vectors(values, row, inside, width, BLOCK)
    if KIND == "adam" or KIND == "rowwise_adam":
        first = load_vectors(mean, row, inside, width, BLOCK)
    if KIND == "adam":
        second = load_vectors(square, row, inside, width, BLOCK)
    if KIND == "rowwise_adagrad" or KIND == "rowwise_adam":
        second = tl.load(square + row, mask=inside, other=0.0)
    if KIND != "add":
        total *= tl.load(scale).to(tl.float32)
    tl.debug_barrier()  # several threads may hold a copy of a number: all have read it before one of them writes
    if KIND == "add":
        new = old + total
    else:
        change = total
        if KIND == "rowwise_adagrad":
            second += tl.sum(total * total, axis=1) / width
            tl.store(square + row, second, mask=inside)
            change = divide(total, (tl.sqrt_rn(second) + eps)[:, None])
        if KIND == "adam":
            second = decay_to(second, total * total, weight2)
            store_vectors(square, row, inside, width, second, BLOCK)
        if KIND == "rowwise_adam":
            second = decay_to(second, tl.sum(total * total, axis=1) / width, weight2)
            tl.store(square + row, second, mask=inside)
            second = second[:, None]
        if KIND == "adam" or KIND == "rowwise_adam":
            first = decay_to(first, total, weight1)
            store_vectors(mean, row, inside, width, first, BLOCK)
            change = divide(divide(first, correction1), divide(tl.sqrt_rn(second), root_correction2) + eps)
        new = old * keep - lr * change
        if values.dtype.element_ty == tl.bfloat16:
            new = round_at_random(new, row.to(tl.int64) * row_stride + row_offset, key, width, BLOCK)
    store_vectors(values, row, inside, width, new, BLOCK)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def update_given(
    rows,
    grad,
    values,
    mean,
    square,
    scale,
    lr,
    keep,
    weight1,
    weight2,
    correction1,
    root_correction2,
    eps,
    key,
    row_stride,
    row_offset,
    width,
    num,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates ROWS rows whose gradients are given."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < num
    row = tl.load(rows + place, mask=inside, other=0)
    total = load_vectors(grad, place, inside, width, BLOCK)
    finish_rows(
        total, row, inside, values, mean, square, scale, lr, keep, weight1, weight2, correction1, root_correction2, eps,
        key, row_stride, row_offset, width, KIND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def sum_short(
    rows,
    order,
    number,
    starts,
    grad,
    values,
    mean,
    square,
    scale,
    lr,
    keep,
    weight1,
    weight2,
    correction1,
    root_correction2,
    eps,
    key,
    row_stride,
    row_offset,
    num_slots,
    width,
    num,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums each of ROWS segments of at most SPAN places, place by place, and finishes their rows."""
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = segment < tl.load(number + num - 1)
    begin = tl.load(starts + segment, mask=inside, other=0)
    length = tl.load(starts + segment + 1, mask=inside, other=0) - begin
    inside = inside & (length <= SPAN)
    row = tl.load(rows + begin, mask=inside, other=0)
    length = tl.where(inside, length, 0)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    slot = tl.load(order + begin, mask=length > 0, other=0)
    for step in range(tl.max(length, axis=0)):
        later = tl.load(order + begin + step + 1, mask=step + 1 < length, other=0)  # under way while vectors are read
        total += load_vectors(grad, slot // num_slots, step < length, width, BLOCK)
        slot = later
    finish_rows(
        total, row, inside, values, mean, square, scale, lr, keep, weight1, weight2, correction1, root_correction2, eps,
        key, row_stride, row_offset, width, KIND, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num"])
def sum_pieces(
    order,
    number,
    starts,
    grad,
    partial,
    num_slots,
    width,
    num,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the pieces of long segments that lie in one span of SPAN places.

    A segment longer than a span covers the first place of a span or its last one; so a span has at most two pieces,
    and writes them to `partial[2 span]` and `partial[2 span + 1]`.
    """
    span = tl.program_id(0)
    first = span * SPAN
    last = tl.minimum(first + SPAN, num)
    for side in tl.static_range(2):
        own = tl.load(number + (first if side == 0 else last - 1))
        begin = tl.load(starts + own - 1, mask=own > 0, other=0)
        end = tl.load(starts + own, mask=own > 0, other=0)
        starts_inside = begin > first
        if (end - begin > SPAN) & (starts_inside == (side == 1)):
            sums = tl.zeros([1, BLOCK], dtype=tl.float32)
            end = tl.minimum(end, last)
            for start in range(tl.maximum(begin, first), end, ROWS):
                place = start + tl.arange(0, ROWS)
                vector = tl.load(order + place, mask=place < end, other=0) // num_slots
                sums += tl.sum(load_vectors(grad, vector, place < end, width, BLOCK), axis=0)[None, :]
            at = 2 * span + side + tl.zeros([1], dtype=tl.int32)
            store_vectors(partial, at, at >= 0, width, sums, BLOCK)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def sum_long(
    rows,
    number,
    starts,
    partial,
    values,
    mean,
    square,
    scale,
    lr,
    keep,
    weight1,
    weight2,
    correction1,
    root_correction2,
    eps,
    key,
    row_stride,
    row_offset,
    width,
    num,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the pieces of the long segment that begins in this span, if there is one, and finishes its row."""
    span = tl.program_id(0)
    own = tl.load(number + tl.minimum(span * SPAN + SPAN, num) - 1)
    begin = tl.load(starts + own - 1, mask=own > 0, other=0)
    end = tl.load(starts + own, mask=own > 0, other=0)
    if (end - begin > SPAN) & (begin >= span * SPAN):
        total = tl.zeros([1, BLOCK], dtype=tl.float32)
        num_spans = tl.cdiv(end, SPAN)
        for start in range(span, num_spans, ROWS):
            piece = start + tl.arange(0, ROWS)
            at = 2 * piece + ((piece == span) & (begin > span * SPAN)).to(tl.int32)
            total += tl.sum(load_vectors(partial, at, piece < num_spans, width, BLOCK), axis=0)[None, :]
        row = tl.load(rows + begin + tl.zeros([1], dtype=tl.int32))
        finish_rows(
            total, row, row >= 0, values, mean, square, scale, lr, keep, weight1, weight2, correction1,
            root_correction2, eps, key, row_stride, row_offset, width, KIND, BLOCK,
        )  # fmt: skip
