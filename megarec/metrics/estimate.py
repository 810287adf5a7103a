"""A mean with what it is worth."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric over `count` users or events and its standard error; both nan when nothing was counted."""

    value: float
    standard_error: float
    count: int


def estimate_mean(values: Float64, weights: Float64 | None = None) -> Estimate:
    """The (weighted) mean of independent `values` `[n]`.

    The standard error is `s / sqrt(n)` with the sample deviation s (n - 1). With weights it is that of a ratio,
    `sqrt(n / (n - 1) sum w^2 (x - mean)^2) / sum w`, which is the same when all weights are equal; nan for n = 1.
    """
    count = len(values)
    if count == 0:
        return Estimate(value=float("nan"), standard_error=float("nan"), count=0)
    weights = np.ones(count) if weights is None else weights
    mean = float(np.sum(weights * values) / np.sum(weights))
    if count == 1:
        return Estimate(value=mean, standard_error=float("nan"), count=1)
    squares = np.sum((weights * (values - mean)) ** 2) * count / (count - 1)
    return Estimate(value=mean, standard_error=float(np.sqrt(squares) / np.sum(weights)), count=count)
