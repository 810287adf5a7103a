"""Measures a case: all gates first, then the times of what is green, in turns."""

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.bench.cases import Case, Inputs, Method, draw_inputs, name_of
from kernels.bench.harness.clock import Limits, time_in_turns
from kernels.bench.harness.gate import (
    BASELINE_SLACK,
    Bound,
    as_tuple,
    judge,
    make_bounds,
    measure_errors,
    upstream_gradients,
)
from kernels.bench.harness.rows import Row, compare, difference, figures_of


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method with its row and the case whose inputs and reference are its own."""

    row: Row
    case: Case
    method: Method


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How cases are measured.

    Attributes:
        device: where.
        seed: of the inputs.
        seconds: of timing for each method and part.
        limits: by dtype, measured in this run.
        peers: by op and name.
        alone: measures a green row further in processes of its own: writes into the row.
        advance: is told what is under way: `num_steps` times for a case.
    """

    device: torch.device
    seed: int
    seconds: float
    limits: Mapping[torch.dtype, Limits]
    peers: Mapping[str, Mapping[str, Method]]
    alone: Callable[[Row], None]
    advance: Callable[[str], None]

    def num_steps(self, op: str, case: Case) -> int:
        """A step for each gate, one for the times."""
        return len(list(self._entries(op, case, torch.float32))) + 1

    def measure(self, op: str, case: Case, dtype: torch.dtype) -> list[Row]:
        """The rows of one case, each method once; the ratios are those of this case."""
        entries = list(self._entries(op, case, dtype))
        self._open_gates(entries, dtype)
        green = [entry for entry in entries if entry.row.status == "green"]
        self.advance(f"{op}: {case.name}, {name_of(dtype)}, times of {len(green)}")
        self._time(green, dtype)
        for entry in green:
            with failures_in(entry.row):
                if entry.row.status == "green":
                    self.alone(entry.row)
        rows = [entry.row for entry in entries]
        compare(rows)
        return rows

    def _entries(self, op: str, case: Case, dtype: torch.dtype) -> Iterator[Entry]:
        def entry(kind: str, name: str, own: Case, method: Method) -> Entry:
            row = Row(op=op, case=case.name, dtype=name_of(dtype), method=name, kind=kind)  # type: ignore[arg-type]
            return Entry(row=row, case=own, method=method)

        groups = {"ours": case.ours, "baseline": case.baselines, "peer": self.peers.get(op, {})}
        for kind, methods in groups.items():
            for name, method in methods.items():
                yield entry(kind, name, case, method)
        for name, other in case.beside.items():
            yield entry("beside", name, other, next(iter(other.ours.values())))

    def _open_gates(self, entries: list[Entry], dtype: torch.dtype) -> None:
        bounds: dict[int, Mapping[str, Bound] | Row] = {}
        for entry in entries:
            row, case = entry.row, entry.case
            self.advance(f"{row.op}: {row.case}, {row.dtype}, gate of {row.method}")
            if id(case) not in bounds:
                with failures_in(row):
                    bounds[id(case)] = make_bounds(case, device=self.device, dtype=dtype, seed=self.seed)
                if row.status != "green":
                    row.why = f"the reference: {row.why}"
                    bounds[id(case)] = row
            found = bounds[id(case)]
            if isinstance(found, Row):
                row.fail("failed", found.why)
                continue
            with failures_in(row):
                self._check(entry, found, dtype)
            free_memory()

    def _check(self, entry: Entry, bounds: Mapping[str, Bound], dtype: torch.dtype) -> None:
        row, case = entry.row, entry.case
        inputs = draw_inputs(case, device=self.device, dtype=dtype, seed=self.seed)
        errors = measure_errors(entry.method, case, inputs, bounds)
        slack = BASELINE_SLACK if row.kind in ("baseline", "beside") else 1.0
        row.errors = {name: {"found": error, "allowed": slack * bounds[name].allowed} for name, error in errors.items()}
        why = judge(errors, bounds, slack=slack)
        if why:
            row.fail("red", why)

    def _time(self, entries: list[Entry], dtype: torch.dtype) -> None:
        """All in the same rounds, from inputs that are not those of the gate; a method that fails here leaves."""
        inputs: dict[int, Inputs] = {}
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for entry in entries:
            case, row = entry.case, entry.row
            with failures_in(row):
                if id(case) not in inputs:
                    inputs[id(case)] = draw_inputs(case, device=self.device, dtype=dtype, seed=self.seed + 1)
                forward, both = make_calls(entry.method, inputs[id(case)], case.gradients)
                row.peak_mib = _peak_on_cuda(both or forward) if self.device.type == "cuda" else None
                calls[row.method, "forward"] = forward
                if both is not None:
                    calls[row.method, "both"] = both
            if row.status != "green":
                free_memory()  # of what lacked memory
        green = [entry for entry in entries if entry.row.status == "green"]
        if not green:
            return
        first = green[0].row
        with failures_in(first):
            times = time_in_turns(calls, device=self.device, seconds=self.seconds)
        if first.status != "green":  # nobody knows whose call it was
            for entry in reversed(green):
                entry.row.fail("failed", f"in the rounds of all methods: {first.why}")
            return
        limits = self.limits[dtype]
        for entry in green:
            row = entry.row
            forward_work, backward_work = entry.case.work(inputs[id(entry.case)])
            row.forward = figures_of(times[row.method, "forward"], forward_work, limits)
            if entry.case.gradients:
                row.both = figures_of(times[row.method, "both"], forward_work + backward_work, limits)
                row.backward = difference(row.both, row.forward, backward_work, limits)
        calls.clear()
        inputs.clear()
        free_memory()


def make_calls(
    method: Method, inputs: Inputs, gradients: tuple[str, ...]
) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """The forward, and forward and backward (None without gradients), after both have run once."""

    def forward() -> tuple[Tensor, ...]:
        return as_tuple(method(inputs))

    if not gradients:
        forward()
        return forward, None
    leaves, upstream = [inputs[name] for name in gradients], upstream_gradients(forward())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, upstream, allow_unused=True)

    both()
    return forward, both


def _peak_on_cuda(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def free_memory() -> None:
    """Gives back what a case has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def failures_in(row: Row) -> Iterator[None]:
    """What a method raises becomes the words of its row; the run goes on, the traceback is on stderr."""
    try:
        yield
    except NotImplementedError as error:
        row.fail("skipped", _first_line(error))
    except torch.OutOfMemoryError:
        row.fail("failed", "out of memory")
    except Exception as error:  # whatever a kernel does, the other rows are worth having
        traceback.print_exc()
        row.fail("failed", f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no words").splitlines()[0]
