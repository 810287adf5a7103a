"""What a run says of a method at a shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from kernels.bench.cases import Work
from kernels.bench.harness.clock import Limits

PARTS = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The time of one part of the work, and how far that is from the measured limit.

    Attributes:
        ms: the median.
        low_ms: a tenth of the calls took less; None for the difference of two medians.
        high_ms: a tenth took more.
        calls: how many were timed.
        tflops: 1e12 operations per second, by the formula of the case.
        gbps: 1e9 bytes per second, likewise.
        share_of_limit: the least time by the measured matrix product and copy, over `ms`.
    """

    ms: float
    low_ms: float | None
    high_ms: float | None
    calls: int
    tflops: float
    gbps: float
    share_of_limit: float


@dataclass(kw_only=True)
class Row:
    """One method at one shape. No figure stands in a row that is not green.

    Attributes:
        op: the op.
        case: its name.
        dtype: of the inputs, such as `bfloat16`.
        method: its name.
        kind: whose it is; `beside`: it computes something else.
        status: what came of it.
        why: words, if it is not green.
        errors: by output and gradient: the error found, and the one allowed.
        forward: the forward, which keeps what a backward needs.
        backward: the difference of the other two.
        both: forward and backward.
        peak_mib: memory beyond the inputs, in forward and backward.
        first_step_s: seconds from launch to the first finished forward and backward: `nothing` (a process that only
            imports and multiplies), `cold` and `warm` (empty and full caches of compiled kernels).
        ratios: of ours: by method and part, how many times the time of ours it takes; `memory` likewise.
    """

    op: str
    case: str
    dtype: str
    method: str
    kind: Literal["ours", "baseline", "peer", "beside"]
    status: Literal["green", "red", "skipped", "failed"] = "green"
    why: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    forward: Figures | None = None
    backward: Figures | None = None
    both: Figures | None = None
    peak_mib: float | None = None
    first_step_s: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)

    def fail(self, status: Literal["red", "skipped", "failed"], why: str) -> None:
        """Says what went wrong and forgets what was measured."""
        self.status, self.why = status, why
        self.forward = self.backward = self.both = self.peak_mib = None
        self.first_step_s = {}


def figures_of(times: Sequence[float], work: Work, limits: Limits) -> Figures:
    """The figures of single calls, in milliseconds."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    figures = _figures(median(ordered), work, limits)
    return Figures(**vars(figures) | {"low_ms": ordered[tenth], "high_ms": ordered[-1 - tenth], "calls": len(ordered)})


def difference(both: Figures, forward: Figures, work: Work, limits: Limits) -> Figures | None:
    """The backward; None if noise has made it take no time."""
    return _figures(both.ms - forward.ms, work, limits) if both.ms > forward.ms else None


def compare(rows: Sequence[Row]) -> None:
    """Fills the ratios of ours: what every other green row of the case takes over what ours takes."""
    for own in (row for row in rows if row.kind == "ours" and row.status == "green"):
        for other in (row for row in rows if row is not own and row.status == "green"):
            ratios = {}
            for part in PARTS:
                mine, theirs = getattr(own, part), getattr(other, part)
                if mine is not None and theirs is not None:
                    ratios[part] = theirs.ms / mine.ms
            if own.peak_mib and other.peak_mib:
                ratios["memory"] = other.peak_mib / own.peak_mib
            own.ratios[other.method] = ratios


def _figures(ms: float, work: Work, limits: Limits) -> Figures:
    return Figures(
        ms=ms,
        low_ms=None,
        high_ms=None,
        calls=0,
        tflops=work.flops / ms / 1e9,
        gbps=work.bytes / ms / 1e6,
        share_of_limit=limits.seconds(work.flops, work.bytes) * 1e3 / ms,
    )
