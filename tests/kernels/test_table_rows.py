"""Kernels on rows of tables against fp64, in Triton: on a GPU, or by its interpreter. Unread memory is NaN."""

import os
from collections.abc import Iterator

import pytest
import torch
from megarec_kernels.table_rows import Kind, RowUpdate, make_state, reference, update_bags, update_rows
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.table_rows import gpu

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
KINDS: list[Kind] = ["sgd", "rowwise_adagrad", "adam", "rowwise_adam"]
EPS = torch.finfo(torch.float32).eps
SPAN = gpu.SPAN
# Bags, slots of each, rows of the table, width: one row takes all; segments end where spans end and do not.
SHAPES = [(1, 1, 1, 1), (100, 3, 7, 5), (63, 1, 500, 40), (2 * SPAN, 1, 1, 8), (SPAN, 4, 2, 16), (5, 2, 9, 300)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch allocates is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(bags: int, slots: int, num_rows: int, *, seed: int = 0) -> Tensor:
    """Rows with many empty slots; the last bag is empty and row 0 is popular."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, num_rows, (bags, slots), generator=generator)
    index[torch.rand(bags, slots, generator=generator) < 0.3] = 0
    if bags > 1:
        index[-1] = -1
    return index.to(DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def poison_unused(rows: Tensor, index: Tensor) -> Tensor:
    """NaN in every row that `index` does not name."""
    used = torch.zeros(len(rows), dtype=torch.bool, device=DEVICE)
    used[index[index >= 0]] = True
    return rows.masked_fill(~used[:, None], torch.nan)


def dense_sums(index: Tensor, grad: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The gradient of every row in fp64, and how far the sum of as many numbers in fp32 may be from it."""
    counts, sums, sizes = (
        torch.zeros(num_rows + 1, n, dtype=torch.float64, device=DEVICE) for n in (1, *[grad.shape[1]] * 2)
    )
    for slot in range(index.shape[1]):
        rows = torch.where(index[:, slot] < 0, num_rows, index[:, slot])
        counts.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64)[:, None])
        sums.index_add_(0, rows, grad.double())
        sizes.index_add_(0, rows, grad.double().abs())
    return sums[:-1], (counts * EPS * sizes)[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("bags", "slots", "num_rows", "width"), SHAPES)
def test_bags_are_summed(bags: int, slots: int, num_rows: int, width: int, dtype: torch.dtype) -> None:
    index = draw(bags, slots, num_rows)
    table = poison_unused(normal(num_rows + 1, width, dtype=dtype), index)  # the row of zeros too
    found = gpu.run_sum_bags(table, index.view(1, bags, slots))
    parts = table.nan_to_num(0.0).double()[index] * (index >= 0)[..., None]
    assert found.shape == (1, bags, width) and found.dtype == dtype
    allowed = (slots * EPS + torch.finfo(dtype).eps / 2) * parts.abs().sum(1)
    assert ((found[0].double() - parts.sum(1)).abs() <= allowed).all()


@pytest.mark.parametrize(("bags", "slots", "num_rows", "width"), SHAPES)
def test_gradients_are_added_up(bags: int, slots: int, num_rows: int, width: int) -> None:
    index = draw(bags, slots, num_rows)
    grad = normal(bags, width)
    grad[(index < 0).all(1)] = torch.nan
    found = torch.zeros(num_rows, width, device=DEVICE)
    gpu.run_add_by_row(found, grad, index)
    want, allowed = dense_sums(index, grad.nan_to_num(0.0), num_rows)
    assert ((found.double() - want).abs() <= allowed).all()
    again = torch.zeros_like(found)
    gpu.run_add_by_row(again, grad, index)
    assert torch.equal(found, again)
    gpu.run_add_by_row(again, grad, index)
    assert torch.equal(again, 2 * found)


@pytest.mark.parametrize("length", [SPAN - 1, SPAN, SPAN + 1, 2 * SPAN, 3 * SPAN + 5])
@pytest.mark.parametrize("before", [0, 1, SPAN - 1, SPAN])
def test_long_segments_begin_and_end_anywhere(before: int, length: int) -> None:
    index = torch.tensor([0] * before + [1] * length + [2] * 3, device=DEVICE)[:, None]
    grad = normal(len(index), 2)
    found = torch.zeros(3, 2, device=DEVICE)
    gpu.run_add_by_row(found, grad, index)
    want, allowed = dense_sums(index, grad, 3)
    assert ((found.double() - want).abs() <= allowed).all()


def test_only_empty_slots_change_nothing() -> None:
    index, grad = torch.full((SPAN + 9, 1), -1, device=DEVICE), torch.full((SPAN + 9, 4), torch.nan, device=DEVICE)
    total, state = normal(3, 4), make_state("adam", torch.empty(3, 4, device=DEVICE), torch.float32)
    before = total.clone()
    gpu.run_add_by_row(total, grad, index)
    gpu.run_update_bags(total, state, index=index, grad=grad, update=RowUpdate(kind="adam", lr=0.1))
    assert torch.equal(total, before)


def test_sums_of_sorted_rows() -> None:
    rows = torch.tensor([2, 2, 5, 9, 9, 9, 2**40], device=DEVICE)
    source = torch.tensor([3, 0, 1, 1, 2, 0, 3], device=DEVICE)
    values = normal(4, 6)
    distinct, sums = gpu.run_sum_by_row(values, rows, source)
    want_distinct, want = reference.sum_by_row_reference(values, rows, source)
    assert torch.equal(distinct, want_distinct)
    torch.testing.assert_close(sums, want, rtol=3 * EPS, atol=3 * EPS)


def settings(kind: Kind, **changes: object) -> RowUpdate:
    update = {"lr": 0.1, "scale": 0.7, "step": 3, "beta1": 0.9, "beta2": 0.99, "eps": 0.1, "weight_decay": 0.1}
    return RowUpdate(kind=kind, **(update | changes))


def used_state(kind: Kind, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    state = make_state(kind, values, dtype)
    return {name: normal(*tensor.shape, seed=5).abs().to(dtype) for name, tensor in state.items()}


def assert_updated(found: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """At most twice as far from fp64 as plain torch in fp32 is, and four roundings that it may have been spared."""
    for name, value in truth.items():
        largest = value.abs().max()
        allowed = 2 * (plain[name].double() - value).abs().max() + 4 * EPS * largest
        assert (found[name].double() - value).abs().max() <= allowed, name


@pytest.mark.parametrize("changes", [{}, {"beta1": 0.3, "beta2": 0.4, "step": 1}], ids=["usual", "small betas"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_updated(kind: Kind, changes: dict[str, float]) -> None:
    rows = torch.tensor([0, 3, 4, 90, 99], device=DEVICE)
    values, grad = normal(100, 37), normal(5, 37, seed=2)
    results = []
    for dtype in (None, torch.float32, torch.float64):
        mine = values.to(dtype or torch.float32, copy=True)
        state = used_state(kind, mine, mine.dtype)
        run = gpu.run_update_rows if dtype is None else reference.update_rows_reference
        run(mine, state, rows=rows, grad=grad.to(mine.dtype), update=settings(kind, **changes))
        results.append({"values": mine, **state})
    assert_updated(*results)
    untouched = torch.ones(100, dtype=torch.bool, device=DEVICE).index_fill(0, rows, False)
    for name, tensor in ({"values": values} | used_state(kind, values, torch.float32)).items():
        assert torch.equal(results[0][name][untouched], tensor[untouched])


@pytest.mark.parametrize("kind", KINDS)
def test_updates_in_the_pass_of_the_sums(kind: Kind) -> None:
    """Short and long segments; the scale is on the device."""
    index = draw(2 * SPAN, 1, 20)
    values, grad = normal(20, 12), normal(2 * SPAN, 12, seed=2)
    grad[index[:, 0] < 0] = torch.nan
    update = settings(kind, scale=torch.tensor(0.7, device=DEVICE))
    one, two = values.clone(), values.clone()
    first, second = used_state(kind, values, torch.float32), used_state(kind, values, torch.float32)
    gpu.run_update_bags(one, first, index=index, grad=grad, update=update)
    rows = index[index >= 0].unique()
    sums = torch.zeros_like(values)
    gpu.run_add_by_row(sums, grad, index)
    gpu.run_update_rows(two, second, rows=rows, grad=sums[rows], update=update)
    assert torch.equal(one, two)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("fault", ["", "key", "row_offset", "row_stride"])
def test_rows_round_by_the_bits_of_the_hash(fault: str) -> None:
    """Every step here is exact in fp32, so bf16 rows differ only by the bits that round them."""
    values = (normal(50, 19) * 8).round().div(8).bfloat16()
    rows, grad = torch.arange(0, 50, 2, device=DEVICE), normal(25, 19, seed=2).mul(64).round().div(64)
    rounding = {
        "lr": 2.0**-7,
        "scale": 1.0,
        "weight_decay": 0.0,
        "key": 2**63 + 12345,
        "row_stride": 3,
        "row_offset": 2,
    }
    found, want = values.clone(), values.clone()
    changed = rounding | ({fault: rounding[fault] + 1} if fault else {})
    gpu.run_update_rows(found, {}, rows=rows, grad=grad, update=settings("sgd", **changed))
    reference.update_rows_reference(want, {}, rows=rows, grad=grad, update=settings("sgd", **rounding))
    assert torch.equal(found, want) == (not fault)
    assert not torch.equal(found, values)


@pytest.mark.parametrize("twin", [False, True])
def test_what_is_no_number_or_infinite_stays_so_when_it_is_rounded(twin: bool) -> None:
    """The NaN of NVIDIA's arithmetic has all bits set: one more would make it a zero."""
    values = normal(2, 19).bfloat16()
    grad = torch.full((2, 19), 0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(torch.float32)
    grad[1] = torch.inf
    run = reference.update_rows_reference if twin else gpu.run_update_rows
    run(values, {}, rows=torch.arange(2, device=DEVICE), grad=grad, update=settings("sgd"))
    assert values[0].isnan().all() and values[1].eq(-torch.inf).all()


@pytest.mark.parametrize("fault", ["lr", "scale", "step", "beta1", "beta2", "eps", "weight_decay"])
def test_a_wrong_setting_is_seen(fault: str) -> None:
    rows = torch.arange(4, device=DEVICE)
    values, grad = normal(4, 8), normal(4, 8, seed=2)
    right, wrong = settings("rowwise_adam"), settings("rowwise_adam", **{fault: 1.01 * getattr(settings("sgd"), fault)})
    results = []
    for dtype, update in ((None, wrong), (torch.float32, right), (torch.float64, right)):
        mine = values.to(dtype or torch.float32, copy=True)
        state = used_state("rowwise_adam", mine, mine.dtype)
        run = gpu.run_update_rows if dtype is None else reference.update_rows_reference
        run(mine, state, rows=rows, grad=grad.to(mine.dtype), update=update)
        results.append({"values": mine, **state})
    with pytest.raises(AssertionError):
        assert_updated(*results)


@pytest.mark.gpu
def test_rows_beyond_2_to_the_31_numbers() -> None:
    """4 GB of bf16; what lies that far back is read, added to and updated where it is."""
    num_rows, width = 2**24 + 3, 128
    table = torch.zeros(num_rows + 1, width, dtype=torch.bfloat16, device="cuda")
    table[-4:-1] = 1.0
    index = torch.tensor([[num_rows - 1], [num_rows - 3], [num_rows - 1]], device="cuda")
    assert (gpu.run_sum_bags(table, index) == 1.0).all()
    grad = torch.ones(3, width, device="cuda")
    gpu.run_update_bags(table[:-1], {}, index=index, grad=grad, update=RowUpdate(kind="sgd", lr=0.25))
    assert table[-4:, 0].tolist() == [0.75, 1.0, 0.5, 0.0] and (table[:-4] == 0.0).all()


def test_mistakes_are_named() -> None:
    values = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"state of adam must hold mean \[4, 3\], square \[4, 3\], got nothing"):
        update_bags(values, {}, index=torch.zeros(1, 1), grad=values[:1], update=settings("adam"))
    with pytest.raises(ValueError, match=r"grad must be \[2, 3\]"):
        update_rows(values, {}, rows=torch.tensor([0, 1]), grad=values, update=settings("sgd"))
