"""The loss of a feedback head against the equation, and what missing feedback must not do."""

import math

import pytest
import torch

from megarec.losses.feedback import feedback_loss


def test_a_flag_costs_its_binary_cross_entropy() -> None:
    logits = torch.tensor([[0.3], [-1.2], [2.0], [0.0]], dtype=torch.float64, requires_grad=True)
    loss = feedback_loss(logits, torch.tensor([2, 1, 0, 2]))
    probability = [1 / (1 + math.exp(-x)) for x in (0.3, -1.2, 0.0)]
    expected = -math.log(probability[0]) - math.log(1 - probability[1]) - math.log(probability[2])
    assert loss.item() == pytest.approx(expected, abs=1e-14)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected_gradient = [probability[0] - 1, probability[1], 0.0, probability[2] - 1]
    assert gradient.squeeze(1).tolist() == pytest.approx(expected_gradient, abs=1e-14)


def test_classes_cost_their_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, 4, 0, 2, 2, 0])
    loss = feedback_loss(logits, target)
    probability = logits.detach().exp() / logits.detach().exp().sum(dim=1, keepdim=True)
    known = [(row, int(target[row]) - 1) for row in (0, 1, 3, 4)]
    assert loss.item() == pytest.approx(-sum(math.log(probability[row, c]) for row, c in known), abs=1e-13)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.zeros_like(gradient)
    for row, c in known:
        expected[row] = probability[row]
        expected[row, c] -= 1
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_missing_feedback_full_of_nan_does_not_leak(num_logits: int) -> None:
    logits = torch.zeros(3, num_logits)
    logits[1] = math.nan
    logits.requires_grad_()
    loss = feedback_loss(logits, torch.tensor([1, 0, 2]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("num_logits", [1, 3])
@pytest.mark.parametrize("num_queries", [0, 2])
def test_no_known_feedback_costs_nothing(num_logits: int, num_queries: int) -> None:
    logits = torch.randn(num_queries, num_logits, requires_grad=True)
    loss = feedback_loss(logits, torch.zeros(num_queries, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0.0 and not gradient.any()


def test_bf16_is_summed_in_fp32() -> None:
    loss = feedback_loss(torch.randn(500, 1, dtype=torch.bfloat16), torch.ones(500, dtype=torch.int32))
    assert loss.dtype == torch.float32


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ValueError, match="logits"):
        feedback_loss(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="target"):
        feedback_loss(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="target"):
        feedback_loss(torch.zeros(3, 1), torch.zeros(3))
