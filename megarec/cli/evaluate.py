"""Measures a checkpoint or a bundle on the eval split of a dataset, beside the baselines it must beat.

megarec-evaluate model=outputs/run data=my_data output=outputs/run baselines=true oracle=my_log/oracle.parquet
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarec.base.errors import UserError
from megarec.base.files import read_records
from megarec.cli.command import run
from megarec.inference.baselines.config import BaselineConfig
from megarec.inference.protocol import Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megarec.data.dataset import Dataset, FieldInfo
    from megarec.inference.model import LocalModel
    from megarec.models.choice import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        model: a run directory, a checkpoint or a bundle; None: baselines alone.
        data: the dataset directory; None: the one the run was trained on.
        baselines: measure MostPop, DecayPop, Markov, ItemKNN and feedback rates too.
        oracle: the `oracle.parquet` of a synthetic log.
        output: a directory for evaluation.json and evaluation.png; None: the printed table only.
        max_users: at most so many users; 0 for all.
        metrics: the columns of the printed table.
        device: where the model runs: cpu or cuda.
        protocol: the rules.
        baseline: settings of the baselines.
    """

    model: str | None = None
    data: str | None = None
    baselines: bool = True
    oracle: str | None = None
    output: str | None = None
    max_users: int = 0
    metrics: tuple[str, ...] = ("ndcg@10", "hr@10", "ndcg@100", "recall@100", "mrr", "coverage@10")
    device: Literal["cpu", "cuda"] = "cpu"
    protocol: Protocol = field(default_factory=Protocol)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)

    def __post_init__(self) -> None:
        if self.model is None and not self.baselines and self.oracle is None:
            raise UserError("nothing to measure", fix="Give model=, baselines=true or oracle=")
        if self.model is None and self.data is None:
            raise UserError("without a model the dataset must be named", fix="Give data=...")
        if self.max_users < 0:
            raise UserError("must not be negative", where="max_users")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, from wherever it lies.

    Attributes:
        model: its settings.
        dense, tables: its weights, dense by global name and tables by field.
        step: training steps behind them.
        max_history_events: newest events it was trained to read.
        is_checkpoint: whether it comes from training, and not from a bundle.
        data: the dataset it was trained on, where known.
        evaluation: what training measured last, by metric.
    """

    model: "ModelConfig"
    dense: "Mapping[str, Tensor]"
    tables: "Mapping[str, Tensor]"
    step: int
    max_history_events: int
    is_checkpoint: bool
    data: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def local_model(
        self, fields: "Mapping[str, FieldInfo]", item_side: Mapping[str, Any], *, device: str = "cpu"
    ) -> "LocalModel":
        """The model itself, on a dataset with `fields`."""
        from megarec.inference.model import LocalModel, Weights
        from megarec.models.shape import input_shape

        weights = Weights(dense=self.dense, tables=self.tables)
        shape = input_shape(fields, self.model)
        return LocalModel(self.model, shape, weights, item_side=item_side, name=self.model.name, device=device)


def main() -> None:
    """Runs `megarec-evaluate`."""
    run("megarec-evaluate", EvaluateConfig, measure, about=__doc__)


def measure(config: EvaluateConfig) -> None:
    """Measures everything asked for, prints the table and writes the files."""
    from megarec.cli.evaluation_report import print_tables, write_results
    from megarec.data.dataset import open_dataset
    from megarec.inference.baselines.oracle import read_oracle
    from megarec.inference.baselines.suite import fit_baselines
    from megarec.inference.evaluate import evaluate

    trained = open_trained(Path(config.model)) if config.model else None
    dataset = dataset_of(trained, config.data) if trained else open_dataset(config.data or "")
    protocol = config.protocol
    if trained and protocol.max_history_events is None:
        protocol = replace(protocol, max_history_events=trained.max_history_events)
    results = []
    if trained:
        model = trained.local_model(dataset.fields, dataset.item_side(), device=config.device)
        results.append(evaluate(model, dataset, protocol, max_users=config.max_users))
    if config.baselines:
        for baseline in fit_baselines(dataset, config.baseline):
            results.append(evaluate(baseline, dataset, protocol, max_users=config.max_users))
    if config.oracle:
        oracle = read_oracle(Path(config.oracle), dataset)
        results.append(evaluate(oracle, dataset, protocol, max_users=config.max_users))
    print_tables(results, metrics=config.metrics)
    if config.output:
        facts = {"model": config.model, "step": trained.step if trained else None, "data": str(dataset.path)}
        write_results(Path(config.output), results, facts=facts)


def open_trained(path: Path) -> Trained:
    """Opens a bundle, a run directory or a checkpoint.

    Raises:
        UserError: it is none of them, or damaged.
    """
    from megarec.inference.bundle import is_bundle, open_bundle

    if is_bundle(path):
        bundle = open_bundle(path)
        return Trained(
            model=bundle.config.model,
            dense=bundle.dense,
            tables=bundle.tables,
            step=bundle.config.step,
            max_history_events=bundle.config.max_history_events,
            is_checkpoint=False,
            evaluation=bundle.config.evaluation,
        )
    from megarec.base.config import build
    from megarec.train.config import TrainConfig
    from megarec.train.state import read_weights

    checkpoint, dense, tables = read_weights(path)
    config = build(TrainConfig, checkpoint.manifest.config)
    return Trained(
        model=config.model,
        dense=dense,
        tables=tables,
        step=checkpoint.step,
        max_history_events=config.stream.max_history_events,
        is_checkpoint=True,
        data=config.data,
        evaluation=_last_evaluation(path, checkpoint.step),
    )


def dataset_of(trained: Trained, data: str | None) -> "Dataset":
    """The dataset at `data`, or the one that `trained` was trained on.

    Raises:
        UserError: there is none.
    """
    from megarec.data.dataset import open_dataset

    chosen = data or trained.data
    if chosen is None:
        raise UserError("a bundle does not say which dataset to use", fix="Give data=...")
    return open_dataset(chosen)


def _last_evaluation(path: Path, step: int) -> dict[str, Any]:
    """What training measured last up to `step`, from the `evaluations.jsonl` of the run that `path` is or lies in."""
    for directory in (path, *path.resolve().parents[:2]):
        done = [record for record in read_records(directory / "evaluations.jsonl") if record["step"] <= step]
        if done:
            return dict(done[-1]["metrics"])
    return {}


if __name__ == "__main__":
    main()
