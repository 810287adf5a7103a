"""The progress line, `metrics.jsonl` and TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarec.base.files import new_file
from megarec.base.progress import say
from megarec.parallel.broadcast import gather_objects
from megarec.parallel.fp8.filling import dense_dtype
from megarec.parallel.placement import count_weights
from megarec.train.hooks.hook import Hook
from megarec.train.hooks.meter import Meter, Throughput, measure_matmul_peak, memory_bytes
from megarec.train.step import StepResult
from megarec.train.trainer import Trainer


class LoggingHook(Hook):
    """Every `log_every_steps` steps: one readable line on standard output, one JSON object in `metrics.jsonl`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._losses: list[Tensor] = []
        self._num_skipped = 0
        self._board: Any = None

    def start(self, trainer: Trainer) -> None:
        """Measures the matmul peak and drops metrics of steps that will be taken again."""
        device = trainer.groups.device
        peak = measure_matmul_peak(device, dense_dtype(trainer.config.precision))
        self._meter = Meter(peak_flops=peak, num_ranks=trainer.groups.world.size)
        self._is_main = trainer.groups.world.rank == 0
        self._first_step, self._started = trainer.step, time.perf_counter()
        dense = sum(gather_objects(count_weights(trainer.model), trainer.groups.pipeline))
        if not self._is_main:
            return
        keep_until(self._run_dir / "metrics.jsonl", trainer.step)
        if trainer.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=trainer.step or None)
        tables = trainer.machinery.tables
        say(
            f"{trainer.config.model.name}: {dense:,} dense weights, {tables.num_rows:,} table rows x {tables.width}; "
            f"{_count(trainer.groups.world.size, 'rank')}; matmul peak {peak / 1e12:.3g} TFLOP/s per rank; "
            f"{trainer.step:,} of {_count(trainer.config.num_steps, 'step')} done"
        )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Adds the step to the interval; prints at its end."""
        self._losses.append(result.losses)
        self._num_skipped += not result.updated
        work = trainer.work
        self._meter.add(num_tokens=work.num_tokens, flops=work.flops, waited_seconds=work.waited_seconds)
        if trainer.step % trainer.config.log_every_steps and trainer.step != trainer.config.num_steps:
            return
        mean = torch.stack(self._losses).mean(0)
        dist.all_reduce(mean, group=trainer.groups.data.process_group)
        throughput = self._meter.read()
        self._losses = []
        if self._is_main:
            losses = dict(zip(trainer.machinery.objective.names, mean.tolist(), strict=True))
            self._write(trainer, result, losses, throughput=throughput)

    def finish(self, trainer: Trainer) -> None:
        """Says what was read and what was left out; closes the files."""
        counts = trainer.read_counts
        totals = torch.tensor(list(counts.values()), device=trainer.groups.device)
        dist.all_reduce(totals, group=trainer.groups.data.process_group)
        read = dict(zip(counts, totals.tolist(), strict=True))
        if self._is_main:
            say(
                f"read {read['events']:,} events of {read['histories']:,} histories; left out: "
                f"{read['sampled_out_events']:,} events by stochastic length, "
                f"{read['dropped_events']:,} events older than their windows, "
                f"{read['short_histories']:,} histories of less than two events"
            )
        if self._board is not None:
            self._board.close()

    def _write(self, trainer: Trainer, result: StepResult, losses: dict[str, float], *, throughput: Throughput) -> None:
        memory = memory_bytes(trainer.groups.device)
        elapsed = time.perf_counter() - self._started
        left = (trainer.config.num_steps - trainer.step) * elapsed / (trainer.step - self._first_step)
        record = {
            "step": trainer.step,
            "epoch": trainer.work.epoch,
            "seconds": throughput.seconds,
            "tokens": trainer.work.num_tokens,
            "losses": losses,
            "learning_rate": trainer.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": throughput.tokens_per_second,
            "tflops": throughput.tflops,
            "mfu": throughput.mfu,
            "data_wait": throughput.data_wait,
            "memory_bytes": memory,
            "skipped_steps": self._num_skipped,
        }
        with (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(name, value, trainer.step)
            for name, value in losses.items():
                self._board.add_scalar(f"loss/{name}", value, trainer.step)
        say(
            f"step {trainer.step:>{len(str(trainer.config.num_steps))}}/{trainer.config.num_steps}"
            f"  epoch {trainer.work.epoch:.2f}"
            f"  loss {'  '.join(f'{name} {value:.4f}' for name, value in losses.items())}"
            f"  grad {result.grad_norm:.3g}"
            f"  {throughput.tokens_per_second:,.0f} tokens/s"
            f"  {throughput.tflops:.3g} TFLOP/s (MFU {throughput.mfu:.1%})"
            f"  data-wait {throughput.data_wait:.1%}"
            f"  {memory / 2**30:.2f} GiB"
            f"  ETA {format_seconds(left)}" + (f"  {self._num_skipped} steps skipped" if self._num_skipped else "")
        )


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of a JSONL file that speak of later steps than `step`."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with new_file(path) as staging:
            staging.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
