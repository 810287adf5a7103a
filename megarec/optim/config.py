"""Settings of the optimizer of the dense weights and of the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal

from megarec.base.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule.

    Attributes:
        lr: the highest learning rate.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of squared gradients.
        eps: added to the root of the second moment.
        weight_decay: decoupled; parameters with one dimension (biases, norms) are not decayed.
        clip_norm: the largest global gradient norm, dense and tables together; 0 never clips.
        schedule: what follows the linear warm-up: `constant`, `cosine` or `linear` down to `min_lr`, or `wsd`
            (warm-up, stable, decay), which is constant and falls linearly over the last `decay_steps`.
        warmup_steps: the learning rate rises linearly from 0 over these.
        decay_steps: for `wsd`.
        min_lr: where the schedule ends.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise UserError("must be above 0", where=name)
        for name in ("weight_decay", "clip_norm", "warmup_steps", "decay_steps", "min_lr"):
            if not getattr(self, name) >= 0:
                raise UserError("must not be negative", where=name)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError("must be in [0, 1)", where=name)
        if self.min_lr > self.lr:
            raise UserError("must not be above lr", where="min_lr")
