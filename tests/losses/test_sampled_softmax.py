"""The sampled softmax against twins written from the equations, one query at a time."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.losses.full_softmax import full_softmax
from megarec.losses.sampled_softmax import Correction, sampled_softmax, sampled_softmax_per_position

CORRECTIONS: list[Correction] = ["none", "standard", "negatives_only"]
NUM_ITEMS = 30


def one_loss(
    target: Tensor, negatives: list[Tensor], *, q_target: Tensor, q_negatives: list[Tensor], correction: Correction
) -> Tensor:
    """The loss of one query from logits and probabilities of a draw, as papers write it."""
    if not negatives:
        return target * 0
    if correction == "negatives_only":
        corrected = [s - (q / (1 - q_target)).log() for s, q in zip(negatives, q_negatives, strict=True)]
        total = sum(s.exp() for s in corrected)
        p_target = target.exp() / (target.exp() + total / len(corrected))
        return -(target.exp() / total).log() * (1 - p_target).detach()
    if correction == "standard":
        target = target - q_target.log()
        negatives = [s - q.log() for s, q in zip(negatives, q_negatives, strict=True)]
    return -(target.exp() / (target.exp() + sum(s.exp() for s in negatives))).log()


class Case:
    """Queries, candidates (some of the same item) and how they were drawn."""

    def __init__(self, *, num_queries: int = 11, num_candidates: int = 9, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(num_queries)
        self.query = torch.randn(num_queries, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        candidates = torch.randn(num_candidates, 5, generator=generator, dtype=torch.float64)
        self.candidates = candidates.to(dtype).requires_grad_()
        self.target = torch.randint(0, num_candidates, (num_queries,), generator=generator)
        self.candidate_id = torch.randint(0, 6, (num_candidates,), generator=generator) + 10**12
        self.negative_index = torch.randint(0, num_candidates, (num_queries, 7), generator=generator)
        shares = torch.rand(num_candidates, generator=generator, dtype=torch.float64) + 0.1
        self.q = shares / shares.sum()
        self.inverse_temperature = torch.tensor(1.7, dtype=dtype, requires_grad=True)

    def inputs(self) -> list[Tensor]:
        return [self.query, self.candidates, self.inverse_temperature]

    def arguments(self, correction: Correction, **changes: object) -> dict[str, object]:
        log_q = None if correction == "none" else self.q.log()
        return {
            "log_q": log_q,
            "correction": correction,
            "inverse_temperature": self.inverse_temperature,
            **changes,
        }

    def shared_arguments(self) -> dict[str, object]:
        return {"target": self.target, "candidate_id": self.candidate_id, "chunk_rows": 4}

    def shared(self, correction: Correction, **changes: object) -> Tensor:
        arguments = self.arguments(correction, **{**self.shared_arguments(), **changes})
        return sampled_softmax(self.query, self.candidates, **arguments)  # type: ignore[arg-type]

    def per_position(self, correction: Correction, **changes: object) -> Tensor:
        slots = torch.cat([self.target[:, None], self.negative_index], dim=1)
        order = torch.sort(slots.flatten(), stable=True).indices
        arguments = self.arguments(correction, **{"slots": slots.int(), "order": order, **changes})
        return sampled_softmax_per_position(self.query, self.candidates, **arguments)  # type: ignore[arg-type]

    def twin(self, correction: Correction, negatives_of: "list[list[int]]") -> Tensor:
        total = self.query.new_zeros(())
        for row, (slot, negatives) in enumerate(zip(self.target.tolist(), negatives_of, strict=True)):
            logits = [self.inverse_temperature * (self.query[row] * vector).sum() for vector in self.candidates]
            total = total + one_loss(
                logits[slot],
                [logits[n] for n in negatives],
                q_target=self.q[slot],
                q_negatives=[self.q[n] for n in negatives],
                correction=correction,
            )
        return total

    def shared_negatives(self) -> list[list[int]]:
        ids = self.candidate_id.tolist()
        return [[slot for slot, item in enumerate(ids) if item != ids[target]] for target in self.target.tolist()]

    def own_negatives(self) -> list[list[int]]:
        rows = zip(self.target.tolist(), self.negative_index.tolist(), strict=True)
        return [[slot for slot in negatives if slot != target] for target, negatives in rows]


class Largest(TorchDispatchMode):
    """Remembers the size of the largest result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.layout == torch.strided:
            self.numel = max(self.numel, out.numel())
        return out


def assert_same(found: Tensor, truth: Tensor, inputs: list[Tensor], *, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), truth.double(), rtol=tolerance, atol=tolerance)
    found_gradients, true_gradients = (torch.autograd.grad(loss, inputs) for loss in (found * 0.7, truth * 0.7))
    for a, b in zip(found_gradients, true_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 100])
def test_shared_candidates_equal_the_equations(correction: Correction, chunk_rows: int) -> None:
    case = Case()
    assert any(len(negatives) < 8 for negatives in case.shared_negatives())  # there are accidental hits
    twin = case.twin(correction, case.shared_negatives())
    assert_same(case.shared(correction, chunk_rows=chunk_rows), twin, case.inputs())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("num_queries", [1, 11])
@pytest.mark.parametrize("num_candidates", [2, 9, 40])  # each drawn many times, and some never
def test_negatives_per_position_equal_the_equations(
    correction: Correction, num_queries: int, num_candidates: int
) -> None:
    case = Case(num_queries=num_queries, num_candidates=num_candidates)
    if num_queries > 1 and num_candidates < 40:
        assert any(len(negatives) < 7 for negatives in case.own_negatives())  # there are accidental hits
    assert_same(case.per_position(correction), case.twin(correction, case.own_negatives()), case.inputs())


@pytest.mark.gpu
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_negatives_per_position_on_a_gpu_equal_those_on_the_cpu(correction: Correction) -> None:
    case, truth = Case(num_queries=64, num_candidates=40), Case(num_queries=64, num_candidates=40)
    for name, value in vars(case).items():
        on_gpu = value.detach().cuda()
        setattr(case, name, on_gpu.requires_grad_() if value.requires_grad else on_gpu)
    found, wanted = case.per_position(correction), truth.per_position(correction)
    gradients = zip(torch.autograd.grad(found, case.inputs()), torch.autograd.grad(wanted, truth.inputs()), strict=True)
    for a, b in [(found, wanted), *gradients]:
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12)


def test_no_candidate_is_copied_for_a_query() -> None:
    case = Case(num_queries=64, num_candidates=40)
    with Largest() as largest:
        case.per_position("standard")
    assert largest.numel == 64 * 8  # the target and seven negatives, and not their vectors


def test_an_accidental_hit_left_in_would_be_caught() -> None:
    case = Case()
    every_other_slot = [[slot for slot in range(9) if slot != target] for target in case.target.tolist()]
    with pytest.raises(AssertionError):
        assert_same(case.shared("none"), case.twin("none", every_other_slot), case.inputs())


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("per_position", [False, True])
def test_with_every_item_drawn_evenly_the_gradient_is_that_of_the_full_softmax(
    correction: Correction, per_position: bool
) -> None:
    case = Case(num_candidates=NUM_ITEMS)
    case.candidate_id = torch.arange(NUM_ITEMS)
    case.negative_index = torch.arange(NUM_ITEMS).expand(len(case.query), NUM_ITEMS)
    case.q = torch.full((NUM_ITEMS,), 1 / NUM_ITEMS, dtype=torch.float64)
    sampled = case.per_position(correction) if per_position else case.shared(correction)
    full = full_softmax(
        case.query,
        case.candidates,
        target=case.target,
        inverse_temperature=case.inverse_temperature,
        chunk_items=8,
    )
    if correction == "negatives_only":  # its value is another one by construction, its gradient is not
        full = full + (sampled - full).detach()
    assert_same(sampled, full, case.inputs())


@pytest.mark.parametrize("correction", ["standard", "negatives_only"])
def test_the_correction_is_unbiased_in_the_limit(correction: Correction) -> None:
    """Many draws from a skewed distribution, corrected: the gradient nears that of the full softmax."""
    case = Case(num_candidates=NUM_ITEMS)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(case.q, 40_000, replacement=True, generator=generator)
    case.negative_index = draws.expand(len(case.query), -1)
    full = torch.nn.functional.cross_entropy(
        case.inverse_temperature * case.query @ case.candidates.T, case.target, reduction="sum"
    )
    (truth,) = torch.autograd.grad(full, case.query)

    def error(chosen: Correction) -> float:
        (gradient,) = torch.autograd.grad(case.per_position(chosen), case.query)
        return ((gradient - truth).norm() / truth.norm()).item()

    if correction == "negatives_only":
        assert error("negatives_only") < 0.03
    # Without one the popular are pushed away; with the target in the sum of the draws a share Q of it is missing.
    assert error(correction) < error("none")


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_no_queries_cost_nothing(correction: Correction) -> None:
    case = Case(num_queries=0)
    for loss in (case.shared(correction), case.per_position(correction)):
        assert loss.item() == 0.0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, case.inputs()))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_query_without_negatives_costs_nothing(correction: Correction) -> None:
    case = Case()
    case.candidate_id = torch.zeros(9, dtype=torch.int64)
    case.negative_index = case.target[:, None].expand(-1, 3)
    for loss in (case.shared(correction), case.per_position(correction)):
        assert loss.item() == 0.0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, case.inputs()))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_huge_logits_stay_finite(correction: Correction) -> None:
    case = Case(dtype=torch.float32)
    case.inverse_temperature = torch.tensor(1e5, requires_grad=True)
    for loss in (case.shared(correction), case.per_position(correction)):
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, case.inputs()))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_bf16_is_summed_in_fp32(correction: Correction) -> None:
    case, truth = Case(dtype=torch.bfloat16), Case()
    truth.query, truth.candidates = (x.detach().double().requires_grad_() for x in case.inputs()[:2])
    truth.inverse_temperature = case.inverse_temperature.detach().double().requires_grad_()
    for found, expected in (
        (case.shared(correction), truth.shared(correction)),
        (case.per_position(correction), truth.per_position(correction)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(found, case.inputs())
        assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)
        for a, b in zip(gradients, torch.autograd.grad(expected, truth.inputs()), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=2**-8 * b.abs().max().item())  # one rounding


def test_only_what_needs_a_gradient_gets_one_and_nothing_is_kept_without() -> None:
    case = Case()
    case.candidates = case.candidates.detach()
    case.inverse_temperature = case.inverse_temperature.detach()
    assert_same(case.shared("none"), case.twin("none", case.shared_negatives()), [case.query])
    with torch.no_grad():
        assert case.shared("none").grad_fn is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("target", {"target": torch.zeros(3, dtype=torch.int64)}),
        ("log_q", {"log_q": None}),
        ("log_q", {"log_q": torch.zeros(4)}),
        ("correction", {"correction": "half"}),
        ("chunk_rows", {"chunk_rows": 0}),
        ("candidate_id", {"candidate_id": torch.zeros(2, dtype=torch.int64)}),
    ],
)
def test_a_wrong_argument_is_named(name: str, change: dict[str, object]) -> None:
    case = Case()
    arguments = {**case.arguments("standard"), **case.shared_arguments(), **change}
    with pytest.raises(ValueError, match=name):
        sampled_softmax(case.query, case.candidates, **arguments)  # type: ignore[arg-type]


def test_wrong_matrices_are_named() -> None:
    case = Case()
    arguments = {**case.arguments("none"), **case.shared_arguments()}
    with pytest.raises(ValueError, match="query"):
        sampled_softmax(case.query[0], case.candidates, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates"):
        sampled_softmax(case.query, case.candidates[:, :3], **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slots"):
        case.per_position("none", slots=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="order"):
        case.per_position("none", order=torch.zeros(3, dtype=torch.int64))


def test_the_loss_of_two_queries_by_hand() -> None:
    query = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    candidates = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    loss = sampled_softmax(
        query,
        candidates,
        target=torch.tensor([0, 1]),
        candidate_id=torch.tensor([5, 6]),
        log_q=None,
        correction="none",
        inverse_temperature=torch.tensor(1.0, dtype=torch.float64),
        chunk_rows=8,
    )
    assert loss.item() == pytest.approx(math.log(4) + math.log(4 / 3), abs=1e-15)


def test_chunks_bound_the_logits() -> None:
    """No tensor of a chunk is larger than chunk_rows x C."""
    case = Case(num_queries=64, num_candidates=200)
    sizes = []
    for chunk_rows in (8, 16):
        with Largest() as largest:
            case.shared("standard", chunk_rows=chunk_rows)
        sizes.append(largest.numel)
    assert sizes == [8 * 200, 16 * 200]
