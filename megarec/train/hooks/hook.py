"""What happens between steps: named empty methods, called by the trainer on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megarec.train.step import StepResult
    from megarec.train.trainer import Trainer


class Hook:
    """Does nothing; a hook overrides what it needs. Every method runs on every rank, so it may be collective."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After each step; `trainer.step` counts it already."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step."""
