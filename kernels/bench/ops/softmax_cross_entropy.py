"""Softmax cross entropy: losses with their gradients over samples, and the log-sum-exp over all items."""

from collections.abc import Iterator

from megarec_kernels.softmax_cross_entropy import Correction, log_sum_exp, shared_losses
from megarec_kernels.softmax_cross_entropy.reference import log_sum_exp_reference, shared_losses_reference
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Method, Work
from kernels.bench.compiled import compiled

CORRECTIONS: tuple[Correction, ...] = ("none", "standard", "negatives_only")


def cases() -> Iterator[Case]:
    """A chunk of 2,048 queries with 8,192 candidates of width 256, and 8,192 queries with a million items."""
    for correction in CORRECTIONS:
        yield _losses("q9 c50 d8", {"small"}, correction, sizes=(9, 50, 8))
        yield _losses("q2048 c8192 d256", {"h200"}, correction, sizes=(2048, 8192, 256))
    yield _log_sum_exp("q9 v50 d8", {"small"}, sizes=(9, 50, 8), chunk_items=16)
    yield _log_sum_exp("q8192 v1000000 d256", {"h200"}, sizes=(8192, 1_000_000, 256), chunk_items=8192)


def _losses(name: str, sets: set[str], correction: Correction, *, sizes: tuple[int, int, int]) -> Case:
    queries, candidates, width = sizes

    def make_inputs(draw: Draw) -> Inputs:
        log_q = draw.normal(candidates).float().log_softmax(0)
        return {
            "query": draw.normal(queries, width, scale=width**-0.5).float(),
            "candidates": draw.normal(candidates, width).float(),
            "target": draw.integers(queries, high=candidates),
            "candidate_id": draw.integers(candidates, high=4 * candidates),
            "log_q": None if correction == "none" else log_q,
            "inverse_temperature": draw.normal(1).float().abs()[0] + 1,
        }

    def method(function: Method) -> Method:
        def losses(inputs: Inputs) -> tuple[Tensor, ...]:
            rest = {name: value for name, value in inputs.items() if name not in ("query", "candidates")}
            return function(inputs["query"] @ inputs["candidates"].T, **rest, correction=correction)

        return losses

    plain = method(shared_losses_reference)
    return Case(
        name=f"losses {correction} {name}",
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": method(shared_losses)},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=(),
        work=lambda x: (
            Work(flops=2.0 * queries * candidates * width, bytes=8.0 * queries * candidates),
            Work(flops=0.0, bytes=0.0),
        ),
    )


def _log_sum_exp(name: str, sets: set[str], *, sizes: tuple[int, int, int], chunk_items: int) -> Case:
    queries, items, width = sizes

    def make_inputs(draw: Draw) -> Inputs:
        query = draw.normal(queries, width, scale=width**-0.5)
        return {"query": query.float(), "items": draw.normal(items, width).float()}

    def plain(inputs: Inputs) -> Tensor:
        return log_sum_exp_reference(inputs["query"], inputs["items"], chunk_items=chunk_items)

    return Case(
        name=f"log_sum_exp {name}",
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": lambda x: log_sum_exp(x["query"], x["items"], chunk_items=chunk_items)},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=(),
        work=lambda x: (
            Work(flops=2.0 * queries * items * width, bytes=float(x["query"].nbytes + x["items"].nbytes)),
            Work(flops=0.0, bytes=0.0),
        ),
    )
