"""Layer norm, and the residual stream with its norm: what a pre-norm block begins with."""

from collections.abc import Iterator

from megarec_kernels.layer_norm import add_layer_norm, layer_norm
from megarec_kernels.layer_norm.reference import add_layer_norm_reference, layer_norm_reference
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Method, Work
from kernels.bench.compiled import compiled
from kernels.bench.ops.dropout import mask_of

EPS = 1e-6


def cases() -> Iterator[Case]:
    """Alone, behind an add, and behind an add with dropout, at 32 histories of 4,096."""
    for kind in ("norm", "add norm", "add dropout norm"):
        yield _case("t50 width24", {"small"}, kind, num_tokens=50, width=24)
        for width in (512, 1024, 4096):
            yield _case(f"t131072 width{width}", {"h200"}, kind, num_tokens=1 << 17, width=width)


def _case(name: str, sets: set[str], kind: str, *, num_tokens: int, width: int) -> Case:
    alone = kind == "norm"

    def make_inputs(draw: Draw) -> Inputs:
        inputs: Inputs = {"x": draw.normal(num_tokens, width)}
        if not alone:
            inputs["y"] = draw.normal(num_tokens, width)
            inputs["mask"] = mask_of(num_tokens, width, draw.device) if kind == "add dropout norm" else None
        return inputs | {"scale": draw.normal(width), "shift": draw.normal(width)}

    def work(inputs: Inputs) -> tuple[Work, Work]:
        size = inputs["x"].nbytes
        passes = {"norm": (2, 3), "add norm": (4, 4), "add dropout norm": (4, 5)}[kind]
        return Work(flops=0.0, bytes=float(passes[0] * size)), Work(flops=0.0, bytes=float(passes[1] * size))

    ours: Method = _norm if alone else _add_norm
    plain: Method = _plain_norm if alone else _plain_add_norm
    return Case(
        name=f"{kind} {name}",
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": ours},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=("x", "scale", "shift") if alone else ("x", "y", "scale", "shift"),
        work=work,
    )


def _norm(inputs: Inputs) -> Tensor:
    return layer_norm(inputs["x"], inputs["scale"], inputs["shift"], eps=EPS)


def _plain_norm(inputs: Inputs) -> Tensor:
    return layer_norm_reference(inputs["x"], inputs["scale"], inputs["shift"], eps=EPS)


def _add_norm(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, y, mask = inputs["x"], inputs["y"], inputs["mask"]
    return add_layer_norm(x, y, inputs["scale"], inputs["shift"], eps=EPS, mask=mask)


def _plain_add_norm(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, y, mask = inputs["x"], inputs["y"], inputs["mask"]
    return add_layer_norm_reference(x, y, inputs["scale"], inputs["shift"], eps=EPS, mask=mask)
