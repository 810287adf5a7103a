"""The settings of a training run. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from megarec.base.errors import UserError
from megarec.data.stream import StreamConfig
from megarec.embedding.config import TableConfig
from megarec.metrics.protocol import Protocol
from megarec.models.choice import ModelConfig
from megarec.optim.config import OptimizerSettings
from megarec.parallel.fp8.precision import Precision
from megarec.parallel.layout import LayoutConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model learns.

    Attributes:
        next_item: `sampled` softmax over negatives, `full` softmax over every item, or `none`.
        next_item_weight: weight of the next-item loss.
        feedback_weight: weight of each feedback head's loss.
        negatives: `shared`: a pack's distinct targets and the uniform draws serve all its targets; `per_position`:
            uniform draws anew for every target, as the public HSTU tables do.
        num_uniform_negatives: uniform draws from the catalog, per pack or per target.
        correction: the logQ correction: `none`, `standard` or `negatives_only`.
        chunk_rows: targets whose logits exist at one time (sampled softmax with shared negatives).
        chunk_items: items whose logits exist at one time (full softmax).
    """

    next_item: Literal["sampled", "full", "none"] = "sampled"
    next_item_weight: float = 1.0
    feedback_weight: float = 1.0
    negatives: Literal["shared", "per_position"] = "shared"
    num_uniform_negatives: int = 512
    correction: Literal["none", "standard", "negatives_only"] = "standard"
    chunk_rows: int = 128
    chunk_items: int = 1024

    def __post_init__(self) -> None:
        if self.num_uniform_negatives < 0 or min(self.chunk_rows, self.chunk_items) < 1:
            raise UserError("num_uniform_negatives is at least 0, a chunk at least 1")
        if min(self.next_item_weight, self.feedback_weight) < 0:
            raise UserError("a weight is not negative")
        if self.next_item == "sampled" and self.negatives == "per_position" and not self.num_uniform_negatives:
            raise UserError("a sampled softmax needs negatives", where="num_uniform_negatives")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which stay.

    Attributes:
        every_steps: optimizer steps between checkpoints; 0 for none but the last.
        keep_last: how many newest ones stay.
        keep_best: the metric of the periodic evaluation whose best checkpoint stays too, such as `ndcg@10`.
    """

    every_steps: int = 500
    keep_last: int = 2
    keep_best: str | None = None

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep_last < 1:
            raise UserError("every_steps is not negative, keep_last at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        data: the dataset directory that `megarec-make-shards` wrote.
        run_dir: where the run writes: configuration, metrics, checkpoints. A run found there is resumed.
        num_steps: optimizer steps in all.
        seed: of everything random.
        precision: `fp32`; `bf16` compute with fp32 main weights; or that with the products of split maps in FP8, scaled
            by the largest numbers of past steps (`fp8_delayed`), of the tensor at hand (`fp8_current`) or of blocks of
            it (`fp8_blockwise`).
        device: `auto` takes a GPU when there is one.
        num_threads: CPU threads of one process; 0 leaves torch's choice.
        log_every_steps: steps between progress lines.
        evaluate_every_steps: steps between evaluations; 0 for none.
        evaluate_users: at most so many users in a periodic evaluation; 0 for all.
        protocol: the rules of the periodic evaluation.
        tensorboard: write TensorBoard event files into the run directory.
        verify_shards: compare the SHA-256 of every shard before training; the checksum of a block is compared anyway.
    """

    data: str
    run_dir: str = "outputs/run"
    num_steps: int = 1000
    seed: int = 0
    precision: Precision = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int = 0
    log_every_steps: int = 10
    evaluate_every_steps: int = 0
    evaluate_users: int = 0
    tensorboard: bool = True
    verify_shards: bool = True
    protocol: Protocol = field(default_factory=Protocol)
    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    tables: TableConfig = field(default_factory=TableConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def max_history_events(self) -> int:
        """The longest history that training asks about: what a window holds besides the events that come next."""
        asked = max(1, self.stream.candidates_per_window) if self.model.keep_last_event else 0
        return self.stream.max_history_events - asked

    def __post_init__(self) -> None:
        for name in ("num_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise UserError("must be at least 1", where=name)
        for name in ("evaluate_every_steps", "evaluate_users", "num_threads"):
            if getattr(self, name) < 0:
                raise UserError("must not be negative", where=name)
