"""Checkpoints between steps."""

from megarec.checkpoint.save import CheckpointWriter
from megarec.train import state
from megarec.train.hooks.hook import Hook
from megarec.train.step import StepResult
from megarec.train.trainer import Trainer


class CheckpointHook(Hook):
    """Writes a checkpoint every `checkpoint.every_steps` steps and after the last."""

    def __init__(self, writer: CheckpointWriter) -> None:
        self._writer = writer

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Begins a save when one is due; completes one that is ready."""
        every = trainer.config.checkpoint.every_steps
        last = trainer.step == trainer.config.num_steps
        if last or (every and trainer.step % every == 0):
            state.save(self._writer, trainer)
        else:
            self._writer.poll()

    def finish(self, trainer: Trainer) -> None:
        """Waits for the last save."""
        self._writer.finish()
