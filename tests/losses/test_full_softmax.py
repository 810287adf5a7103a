"""The chunked full softmax against the equation."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from megarec.losses.full_softmax import full_softmax
from megarec.parallel.slices import Slices


def make(num_queries: int, num_items: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(num_items)
    shapes = [(num_queries, 6), (num_items, 6), ()]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [value.requires_grad_() for value in values], torch.randint(
        0, num_items, (num_queries,), generator=generator
    )


def run(inputs: list[Tensor], target: Tensor, chunk_items: int) -> Tensor:
    query, items, inverse_temperature = inputs
    return full_softmax(query, items, target=target, inverse_temperature=inverse_temperature, chunk_items=chunk_items)


def twin(inputs: list[Tensor], target: Tensor) -> Tensor:
    query, items, inverse_temperature = inputs
    total = query.new_zeros(())
    for row, slot in enumerate(target.tolist()):
        logits = inverse_temperature * (items * query[row]).sum(dim=1)
        total = total - (logits[slot].exp() / logits.exp().sum()).log()
    return total


@pytest.mark.parametrize("chunk_items", [1, 7, 40, 1000])
@pytest.mark.parametrize("num_queries", [1, 13])
def test_loss_and_all_gradients_equal_the_equation(chunk_items: int, num_queries: int) -> None:
    inputs, target = make(num_queries, 40)
    found, truth = run(inputs, target, chunk_items), twin(inputs, target)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    inputs, target = make(3, 5)
    assert torch.autograd.gradcheck(lambda *values: run(list(values), target, 2), tuple(inputs))


def test_no_queries_cost_nothing() -> None:
    inputs, target = make(0, 5)
    loss = run(inputs, target, 2)
    assert loss.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, inputs))


def test_huge_logits_stay_finite() -> None:
    inputs, target = make(9, 20, torch.float32)
    with torch.no_grad():
        inputs[2].fill_(1e6)
    loss = run(inputs, target, 3)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


def test_bf16_is_summed_in_fp32() -> None:
    inputs, target = make(9, 20, torch.bfloat16)
    exact = [value.detach().double() for value in inputs]
    loss = run(inputs, target, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), twin(exact, target), rtol=1e-5, atol=0)
    assert [g.dtype for g in torch.autograd.grad(loss, inputs)] == [torch.bfloat16] * 3


def test_a_wrong_argument_is_named() -> None:
    inputs, target = make(4, 5)
    with pytest.raises(ValueError, match="query"):
        run([inputs[0][0], *inputs[1:]], target, 2)
    with pytest.raises(ValueError, match="items"):
        run([inputs[0], inputs[1].float(), inputs[2]], target, 2)
    with pytest.raises(ValueError, match="target"):
        run(inputs, target[:2], 2)
    with pytest.raises(ValueError, match="chunk_items"):
        run(inputs, target, 0)


@pytest.mark.parametrize("counts", [[3, 2], [4, 4, 4], [1, 0, 4]], ids=str)
def test_shards_add_up_to_the_whole(counts: list[int]) -> None:
    """Ranks in threads of one process: each counts every second loss, gradients are summed as ranks sum them."""
    num_ranks = len(counts)
    inputs, target = make(9, sum(counts))
    truth = run(inputs, target, 2)
    want = torch.autograd.grad(truth, inputs)
    meeting, box = threading.Barrier(num_ranks), [torch.empty(0)] * num_ranks

    def reduce(rank: int, operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        box[rank] = x.detach()
        meeting.wait()
        reduced = operation(torch.stack(box))
        meeting.wait()
        return reduced

    def of_rank(rank: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        query, items, scale = (value.detach().clone().requires_grad_() for value in inputs)
        first = sum(counts[:rank])
        shards = Slices(
            index=rank,
            count=num_ranks,
            sum=partial(reduce, rank, lambda x: x.sum(0)),
            max=partial(reduce, rank, lambda x: x.amax(0)),
        )
        loss = full_softmax(
            query,
            items[first : first + counts[rank]],
            target=target,
            inverse_temperature=scale,
            chunk_items=2,
            shards=shards,
            first_item=first,
            own=torch.arange(9) % num_ranks == rank,
        )
        return loss.detach(), torch.autograd.grad(loss, (query, items, scale))

    with ThreadPoolExecutor(num_ranks) as pool:
        ranks = list(pool.map(of_rank, range(num_ranks)))
    torch.testing.assert_close(sum(loss for loss, _ in ranks), truth.detach(), rtol=1e-12, atol=1e-12)
    for number, gradient in enumerate(want):
        torch.testing.assert_close(sum(g[number] for _, g in ranks), gradient, rtol=1e-12, atol=1e-12)
