"""What is measured: ops x shapes. One file per op in `kernels/bench/ops`, named as the op, found by itself.

To add an op, write `kernels/bench/ops/<op>.py` with one function:

    from collections.abc import Iterator
    import torch
    from kernels.bench.cases import Case, Draw, Inputs, Work
    from kernels.bench.compiled import compiled

    def cases() -> Iterator[Case]:
        for name, sets, num_rows in (("tiny", {"small"}, 100), ("1m lookups", {"h200"}, 1 << 20)):
            def make_inputs(draw: Draw, num_rows: int = num_rows) -> Inputs:
                return {"x": draw.normal(num_rows, 128), "weight": draw.normal(128, 128, scale=0.1), "eps": 1e-6}
            yield Case(
                name=name,
                sets=frozenset(sets),
                make_inputs=make_inputs,
                truth=lambda x: my_op_reference(x["x"], x["weight"], eps=x["eps"]),
                ours={"ours": lambda x: my_op(x["x"], x["weight"], eps=x["eps"])},
                baselines={"eager": plain, "torch.compile": compiled(plain)},
                gradients=("x", "weight"),
                work=lambda x: (Work(flops=..., bytes=...), Work(flops=..., bytes=...)),
            )

A *method* (`truth`, what is in `ours` and `baselines`, a peer) is `method(inputs) -> Tensor | tuple[Tensor, ...]`:

- `inputs` is what `make_inputs` made; the float tensors named in `gradients` require one. The backward is autograd's.
- What a step makes once for all of its layers (a plan, a mask) a method may keep in `inputs` under a key of its own:
  the untimed first calls make it.
- A method may write into its inputs (an optimizer that updates rows does); whoever is checked gets fresh ones.
- It raises `NotImplementedError("why")` for what it cannot do: the row then says "skipped: why".

Without `gradients` only the forward is checked and timed; an update in place is such a forward, whose outputs are what
it changed. Every method must give the outputs of `truth`, in its order. `truth` runs twice: on the inputs in a wider
dtype, which is the reference, and on the inputs as they are, which says what error the plain version has in that dtype.
It needs no speed but must fit the memory: one history at a time, recomputed in the backward (`by_history`).
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = Tensor | tuple[Tensor, ...]
Method = Callable[[Inputs], Outputs]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Where and in which dtype inputs are drawn, from one seed: equal draws in equal order are equal numbers."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers of standard deviation `scale`, rounded to the dtype."""
        values = torch.randn(*shape, generator=self.generator, device=self.device)
        return values.mul_(scale).to(self.dtype)

    def integers(self, *shape: int, high: int) -> Tensor:
        """Integers from 0 to `high - 1`, int64."""
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the mathematics needs, whatever a method does: floating-point operations and bytes read and written once."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape.

    Attributes:
        name: unique among the cases of the op, such as `b32 n4096 d128 biases`.
        sets: the values of `--shapes` that choose it: `small` (a test, in milliseconds), `cpu` (two cores), `h200`.
        make_inputs: draws what the methods read.
        truth: the plain, slow method that the others are held against.
        ours: our methods by name; `ours` alone, or one per switch, the default first.
        gradients: the inputs whose gradients are checked and timed; empty: forward only.
        work: FLOPs and bytes of the forward and of the backward, from the inputs.
        baselines: other methods by name.
        beside: baselines that compute something else, by name, each a case of its own: its first method of ours is held
            against its own truth and timed in the same rounds. The ratio is that of the times.
    """

    name: str
    sets: frozenset[str]
    make_inputs: Callable[[Draw], Inputs]
    truth: Method
    ours: Mapping[str, Method]
    gradients: tuple[str, ...]
    work: Callable[[Inputs], tuple[Work, Work]]
    baselines: Mapping[str, Method] = field(default_factory=dict)
    beside: Mapping[str, "Case"] = field(default_factory=dict)


def all_cases() -> dict[str, list[Case]]:
    """The cases of every op, by the name of its file."""
    names = sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py"))
    return {name: list(importlib.import_module(f"kernels.bench.ops.{name}").cases()) for name in names}


def draw_inputs(case: Case, *, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Fresh inputs of a case; those that need gradients are leaves."""
    generator = torch.Generator(device).manual_seed(seed)
    inputs = case.make_inputs(Draw(device=device, dtype=dtype, generator=generator))
    return inputs | {name: inputs[name].requires_grad_() for name in case.gradients}


def name_of(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
