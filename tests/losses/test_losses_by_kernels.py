"""The losses with the kernels of a GPU inside, interpreted here, equal those of the CPU, with all gradients."""

from typing import Any

import pytest
import torch
from megarec_kernels import softmax_cross_entropy
from torch import Tensor

from megarec.losses.full_softmax import full_softmax
from megarec.losses.sampled_softmax import Correction, sampled_softmax, sampled_softmax_per_position

pytest.importorskip("triton")

CORRECTIONS: list[Correction] = ["none", "standard", "negatives_only"]
NUM_QUERIES, NUM_ITEMS, WIDTH = 11, 30, 8


def draw() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, items = (torch.randn(n, WIDTH, generator=generator).requires_grad_() for n in (NUM_QUERIES, NUM_ITEMS))
    return query, items, torch.tensor(1.7, requires_grad=True)


def with_gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, inputs)]


def of_sampled(correction: Correction, *, per_position: bool) -> list[Tensor]:
    inputs = query, items, inverse_temperature = draw()
    generator = torch.Generator().manual_seed(4)
    log_q = None if correction == "none" else torch.randn(NUM_ITEMS, generator=generator).log_softmax(0)
    common: Any = {"log_q": log_q, "correction": correction, "inverse_temperature": inverse_temperature}
    slots = torch.randint(0, NUM_ITEMS // 2, (NUM_QUERIES, 9), generator=generator)
    if per_position:
        order = torch.sort(slots.flatten(), stable=True).indices
        loss = sampled_softmax_per_position(query, items, slots=slots.int(), order=order, **common)
    else:
        candidate_id = torch.randint(0, NUM_ITEMS, (NUM_ITEMS,), generator=generator)
        loss = sampled_softmax(query, items, target=slots[:, 0], candidate_id=candidate_id, chunk_rows=4, **common)
    return with_gradients(loss, inputs)


def of_full() -> list[Tensor]:
    inputs = query, items, inverse_temperature = draw()
    target = torch.arange(NUM_QUERIES) * 2
    loss = full_softmax(query, items, target=target, inverse_temperature=inverse_temperature, chunk_items=7)
    return with_gradients(loss, inputs)


def test_all_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here: tests/kernels/test_softmax_kernels.py runs them")

    def everything() -> list[list[Tensor]]:
        sampled = [of_sampled(correction, per_position=own) for correction in CORRECTIONS for own in (False, True)]
        return [*sampled, of_full()]

    wanted = everything()
    asked = []
    monkeypatch.setattr(softmax_cross_entropy, "has_kernel", lambda *_: asked.append(1) or True)
    for found, truth in zip(everything(), wanted, strict=True):
        for a, b in zip(found, truth, strict=True):
            # Sums of at most 11 x 30 terms in other orders: 300 eps of the largest.
            assert (a - b).abs().max() <= 300 * torch.finfo(torch.float32).eps * b.abs().max()
    assert len(asked) == 3 * (3 + 1) + 1 + 5  # chunks of rows and whole sets; the sum, and chunks of items
