"""SiLU of packed rows, and behind the map that makes them: whether one kernel for both pays."""

from collections.abc import Iterator

from megarec_kernels.silu import SiluOn, UvqkLayout, linear_silu, split_silu
from megarec_kernels.silu.reference import linear_silu_reference, split_silu_reference
from torch import Tensor

from kernels.bench.cases import Case, Draw, Inputs, Work
from kernels.bench.compiled import compiled


def cases() -> Iterator[Case]:
    """NVIDIA's layer (width 1024, 4 heads of 256) and that of MLPerf (512, 4 of 128) at 131,072 tokens."""
    for silu_on in ("uvqk", "u"):
        yield _split("t50 n2 h8", {"small"}, silu_on, num_tokens=50, heads=2, width=8)
        for width in (128, 256):
            yield _split(f"t131072 n4 h{width}", {"h200"}, silu_on, num_tokens=1 << 17, heads=4, width=width)
    yield _linear("t50 24x40", {"small"}, num_tokens=50, in_width=24, out_width=40)
    for in_width, out_width in ((512, 2048), (1024, 4096)):
        yield _linear(
            f"t131072 {in_width}x{out_width}", {"h200"}, num_tokens=1 << 17, in_width=in_width, out_width=out_width
        )


def _split(name: str, sets: set[str], silu_on: SiluOn, *, num_tokens: int, heads: int, width: int) -> Case:
    layout = UvqkLayout(num_heads=heads, v_head_width=width, qk_head_width=width)

    def make_inputs(draw: Draw) -> Inputs:
        return {"uvqk": draw.normal(num_tokens, layout.row_width)}

    def plain(inputs: Inputs) -> tuple[Tensor, ...]:
        return split_silu_reference(inputs["uvqk"], layout, silu_on=silu_on)

    def work(inputs: Inputs) -> tuple[Work, Work]:
        share = 1.0 if silu_on == "uvqk" else 0.25  # of the channels is activated
        size = inputs["uvqk"].nbytes
        return Work(flops=0.0, bytes=2 * share * size), Work(flops=0.0, bytes=(2 + share) * size)

    return Case(
        name=f"split on {silu_on} {name}",
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": lambda x: split_silu(x["uvqk"], layout, silu_on=silu_on)},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=("uvqk",),
        work=work,
    )


def _linear(name: str, sets: set[str], *, num_tokens: int, in_width: int, out_width: int) -> Case:
    def make_inputs(draw: Draw) -> Inputs:
        weight = draw.normal(out_width, in_width, scale=in_width**-0.5)
        return {"x": draw.normal(num_tokens, in_width), "weight": weight, "bias": draw.normal(out_width)}

    def plain(inputs: Inputs) -> Tensor:
        return linear_silu_reference(inputs["x"], inputs["weight"], inputs["bias"])

    def work(inputs: Inputs) -> tuple[Work, Work]:
        flops, x, weight = 2.0 * num_tokens * in_width * out_width, inputs["x"].nbytes, inputs["weight"].nbytes
        out = num_tokens * out_width * inputs["x"].element_size()
        forward = Work(flops=flops, bytes=float(x + weight + 2 * out))
        return forward, Work(flops=2 * flops, bytes=float(2 * x + 2 * weight + 2 * out))

    return Case(
        name=f"linear {name}",
        sets=frozenset(sets),
        make_inputs=make_inputs,
        truth=plain,
        ours={"ours": lambda x: linear_silu(x["x"], x["weight"], x["bias"])},
        baselines={"eager": plain, "torch.compile": compiled(plain)},
        gradients=("x", "weight", "bias"),
        work=work,
    )
