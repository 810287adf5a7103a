"""The learning rate as a pure function of the step, so that a resumed run needs no schedule state."""

import math

from megarec.optim.config import OptimizerSettings


def learning_rate(step: int, settings: OptimizerSettings, *, num_steps: int) -> float:
    """The learning rate of update number `step` (0, 1, ...) in a run of `num_steps` updates.

    The first update of a warm-up of `w` steps uses `lr / w`; the last update of the run ends at `min_lr` (except
    with `constant`). Steps beyond `num_steps` keep the last value.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    start = settings.warmup_steps
    if settings.schedule == "wsd":
        start = max(start, num_steps - settings.decay_steps)
    done = min(1.0, max(0.0, (step + 1 - start) / max(1, num_steps - start)))
    if settings.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        left = 1.0 - done
    return settings.min_lr + (settings.lr - settings.min_lr) * left
