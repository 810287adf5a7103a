"""Softmax cross entropy in Triton: on a GPU, or by its interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from earned import DEVICE, draw, error
from megarec_kernels.softmax_cross_entropy import Correction, exponentials, log_sum_exp, own_losses, shared_losses
from megarec_kernels.softmax_cross_entropy.reference import (
    exponentials_reference,
    log_sum_exp_reference,
    own_losses_reference,
    shared_losses_reference,
)
from torch import Tensor

pytest.importorskip("triton")

from megarec_kernels.softmax_cross_entropy import gpu

CORRECTIONS: list[Correction] = ["none", "standard", "negatives_only"]
SHAPES = [(1, 1), (5, 3), (0, 7), (11, 63), (7, 100), (2, 4100)]  # rows, columns; the last takes two blocks
PRODUCTS = [(1, 1, 1), (5, 300, 40), (130, 129, 32), (3, 0, 4), (0, 3, 4), (63, 100, 7)]  # queries, items, width
EPS = torch.finfo(torch.float32).eps
Method = Callable[..., Any]


def on_device(**values: Tensor | None) -> dict[str, Any]:
    return {name: None if value is None else value.to(DEVICE) for name, value in values.items()}


def shared_case(rows: int, columns: int, correction: Correction) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(rows + columns)
    target = torch.randint(0, columns, (rows,), generator=generator)
    candidate_id = torch.randint(0, max(1, columns // 2), (columns,), generator=generator) + 10**12
    log_q = None if correction == "none" else torch.randn(columns, generator=generator).log_softmax(0)
    inverse_temperature = torch.tensor(2.5)
    arguments = on_device(
        target=target, candidate_id=candidate_id, log_q=log_q, inverse_temperature=inverse_temperature
    )
    return draw({"products": (rows, columns)})["products"].detach(), arguments | {"correction": correction}


def own_case(rows: int, columns: int, correction: Correction) -> tuple[Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(rows + columns)
    slots = torch.randint(0, max(2, columns // 2), (rows, columns), generator=generator).int()
    log_q = None if correction == "none" else torch.randn(max(2, columns // 2), generator=generator).log_softmax(0)
    arguments = on_device(slots=slots, log_q=log_q, inverse_temperature=torch.tensor(2.5))
    return draw({"products": (rows, columns)})["products"].detach(), arguments | {"correction": correction}


def shared_kernel(products: Tensor, *, candidate_id: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return gpu.launch_losses(products, ids=candidate_id, **arguments)


def own_kernel(products: Tensor, *, slots: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    return gpu.launch_losses(products, target=None, ids=slots, **arguments)


def assert_losses(kernel: Method, plain: Method, products: Tensor, arguments: dict[str, Any]) -> None:
    """Losses and gradients err at most twice what the plain ones do (and 4 eps), and have the same bits when run again.

    The logits are of size 10: an error of a logit of eps times that is one of e^logit, so 4 eps is 40 eps of a share.
    """

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    truth = plain(wide(products).clone(), **{name: wide(value) for name, value in arguments.items()})
    eager = plain(products.clone(), **arguments)
    found, again = (kernel(products.clone(), **arguments) for _ in range(2))
    for ours, repeated, theirs, true in zip(found, again, eager, truth, strict=True):
        assert torch.equal(ours, repeated)
        if ours.numel():
            assert error(ours, true) <= 2 * error(theirs, true) + 40 * EPS


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_losses_over_candidates_of_all(rows: int, columns: int, correction: Correction) -> None:
    assert_losses(shared_kernel, shared_losses_reference, *shared_case(rows, columns, correction))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_losses_over_candidates_of_each_row(rows: int, columns: int, correction: Correction) -> None:
    assert_losses(own_kernel, own_losses_reference, *own_case(rows, columns, correction))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_several_rows_to_a_program(correction: Correction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MANY_ROWS", 1)
    assert_losses(shared_kernel, shared_losses_reference, *shared_case(9, 1100, correction))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_rows_without_negatives_cost_nothing(correction: Correction) -> None:
    products, arguments = shared_case(5, 9, correction)
    arguments["candidate_id"] = torch.zeros_like(arguments["candidate_id"])
    loss, gradient = shared_kernel(products, **arguments)
    assert not loss.any() and not gradient.any()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_huge_logits_stay_finite(correction: Correction) -> None:
    products, arguments = shared_case(5, 9, correction)
    arguments["inverse_temperature"] = torch.tensor(1e6, device=DEVICE)
    assert all(value.isfinite().all() for value in shared_kernel(products, **arguments))


def test_gradients_take_the_memory_of_the_products() -> None:
    products, arguments = shared_case(5, 9, "standard")
    _, gradient = shared_kernel(products, **arguments)
    assert gradient.data_ptr() == products.data_ptr()


@pytest.mark.parametrize("fault", ["hits", "correction", "temperature", "target"])
def test_a_planted_fault_is_caught(fault: str) -> None:
    products, arguments = shared_case(9, 20, "standard")

    def wrong(products: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        if fault == "hits":  # every slot its own item: accidental hits are negatives
            given["candidate_id"] = torch.arange(20, device=DEVICE)
        elif fault == "correction":
            given |= {"correction": "none", "log_q": None}
        elif fault == "temperature":
            given["inverse_temperature"] = given["inverse_temperature"] * 1.001
        else:
            given["target"] = given["target"].roll(1)
        return shared_kernel(products, **given)

    with pytest.raises(AssertionError):
        assert_losses(wrong, shared_losses_reference, products, arguments)


@pytest.mark.parametrize(("queries", "items", "width"), PRODUCTS)
def test_log_sum_exp(queries: int, items: int, width: int) -> None:
    drawn = [value.detach() for value in draw({"q": (queries, width), "v": (items, width)}).values()]
    assert_log_sum_exp(gpu.launch_log_sum_exp, *drawn)


def test_items_in_parts() -> None:
    """Few queries: the items are cut into parts, the last of which is smaller."""
    query, items = (value.detach() for value in draw({"q": (3, 8), "v": (900, 8)}).values())
    assert_log_sum_exp(gpu.launch_log_sum_exp, query, items)


def assert_log_sum_exp(method: Callable[[Tensor, Tensor], Tensor], query: Tensor, items: Tensor) -> None:
    truth = log_sum_exp_reference(query.double(), items.double(), chunk_items=7)
    eager = log_sum_exp_reference(query.float(), items.float(), chunk_items=7)
    found = method(query, items)
    assert torch.equal(found, method(query, items))
    assert found.shape == truth.shape and found.dtype == torch.float32
    if not len(items):
        assert bool((found == float("-inf")).all())
    elif len(query):
        assert error(found, truth) <= 2 * error(eager, truth) + 4 * EPS


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_exponentials(rows: int, columns: int) -> None:
    products, log_sum = (value.detach() for value in draw({"p": (rows, columns), "l": (rows,)}).values())
    found = gpu.launch_exponentials(products.clone(), log_sum)
    torch.testing.assert_close(found, exponentials_reference(products.clone(), log_sum), rtol=4 * EPS, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_losses_on_a_gpu(correction: Correction) -> None:
    for rows, columns in [*SHAPES, (2048, 3000), (7, 70_000)]:
        assert_losses(shared_losses, shared_losses_reference, *shared_case(rows, columns, correction))
        assert_losses(own_losses, own_losses_reference, *own_case(rows, columns, correction))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_sum_exp_on_a_gpu(dtype: torch.dtype) -> None:
    for queries, items, width in [*PRODUCTS, (300, 20_000, 256), (5, 100_000, 100)]:
        drawn = draw({"q": (queries, width), "v": (items, width)}, dtype).values()
        assert_log_sum_exp(lambda q, v: log_sum_exp(q, v, chunk_items=1), *(value.detach() for value in drawn))
    products, log_sum = (value.detach() for value in draw({"p": (300, 5000), "l": (300,)}).values())
    found = exponentials(products.clone(), log_sum)
    torch.testing.assert_close(found, exponentials_reference(products.clone(), log_sum), rtol=8 * EPS, atol=0)
