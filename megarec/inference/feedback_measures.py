"""How good predicted feedback is: from the logits of a head to named measures."""

import numpy as np
import numpy.typing as npt

from megarec.base.jagged import Int64
from megarec.metrics.feedback import (
    measure_auc,
    measure_calibration,
    measure_calibration_error,
    measure_grouped_auc,
    measure_normalized_entropy,
)

Float64 = npt.NDArray[np.float64]


def measure_feedback(logits: Float64, outcome: Int64, user: Int64) -> dict[str, float]:
    """Measures of one feedback field over the targets whose feedback is known.

    Args:
        logits: `[M, 1]` of the second of two outcomes, or `[M, n]` of n.
        outcome: feedback ids, `[M]`; 0 is unknown, outcomes start at 1.
        user: whose target it is, `[M]`.

    Returns:
        `count` and `normalized_entropy`; for two outcomes also `auc`, `gauc`, `calibration` and `calibration_error`.
        What the targets leave undefined, such as the AUC of one class, is left out.
    """
    known = outcome > 0
    logits, label, user = logits[known], outcome[known] - 1, user[known]
    loss = _cross_entropy(logits, label)
    measures = {"count": float(len(label)), "normalized_entropy": measure_normalized_entropy(label, loss)}
    if logits.shape[1] == 1 and len(label):
        score = logits[:, 0]
        probability = np.exp(-np.logaddexp(0.0, -score))
        measures["auc"] = measure_auc(label, score)
        measures["gauc"] = measure_grouped_auc(label, score, user).value
        measures["calibration"] = measure_calibration(label, probability)
        measures["calibration_error"] = measure_calibration_error(label, probability)
    return {name: value for name, value in measures.items() if not np.isnan(value)}


def _cross_entropy(logits: Float64, label: Int64) -> Float64:
    """Nats of each event, `[M]`."""
    if logits.shape[1] == 1:
        signed = np.where(label == 1, logits[:, 0], -logits[:, 0])
        return np.logaddexp(0.0, -signed)
    own = np.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    return np.logaddexp.reduce(logits, axis=1) - own
