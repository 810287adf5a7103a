"""Measures checkpoints or bundles on one split of a dataset, beside the baselines they must beat.

megarec-evaluate model=outputs/run protocol=hstu_public protocol.filter_seen=full output=outputs/run
megarec-evaluate model=[outputs/seed0,outputs/seed1] data=my_data oracle=my_log/oracle.parquet
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarec.base.config import plain
from megarec.base.errors import UserError
from megarec.base.files import read_records
from megarec.cli.command import run
from megarec.inference.baselines.config import BaselineConfig
from megarec.metrics.protocol import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from megarec.data.dataset import Dataset, FieldInfo
    from megarec.inference.histories import Predictor
    from megarec.inference.model import LocalModel
    from megarec.models.choice import ModelConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure.

    Attributes:
        model: a run directory, a checkpoint or a bundle, or a list of them, a row for each; None: baselines alone.
        data: the dataset directory; None: the one the runs were trained on.
        baselines: measure MostPop, DecayPop, Markov, ItemKNN and feedback rates too.
        oracle: the `oracle.parquet` of a synthetic log.
        output: a directory for evaluation.json and evaluation.png; None: the printed table only.
        max_users: at most so many users; 0 for all.
        device: where the model runs: cpu or cuda.
        protocol: the rules: a ready set by its name, and single fields that differ from it.
        baseline: settings of the baselines.
    """

    model: str | list[str] | None = None
    data: str | None = None
    baselines: bool = True
    oracle: str | None = None
    output: str | None = None
    max_users: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    protocol: Protocol = field(default_factory=Protocol)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)

    def __post_init__(self) -> None:
        if not self.models and not self.baselines and self.oracle is None:
            raise UserError("nothing to measure", fix="Give model=, baselines=true or oracle=")
        if not self.models and self.data is None:
            raise UserError("without a model the dataset must be named", fix="Give data=...")
        if len({Path(model).resolve() for model in self.models}) < len(self.models):
            raise UserError("a model is named twice", where="model")
        if self.max_users < 0:
            raise UserError("must not be negative", where="max_users")

    @property
    def models(self) -> list[str]:
        """The models to measure."""
        return [self.model] if isinstance(self.model, str) else list(self.model or [])


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, from wherever it lies.

    Attributes:
        model: its settings.
        dense, tables: its weights, dense by global name and tables by field.
        step: training steps behind them.
        seed: of the training, where known.
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
    seed: int | None = None
    data: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def local_model(
        self, fields: "Mapping[str, FieldInfo]", item_side: Mapping[str, Any], *, name: str = "", device: str = "cpu"
    ) -> "LocalModel":
        """The model itself, on a dataset with `fields`; its row in a table is called `name`."""
        from megarec.inference.model import LocalModel, Weights
        from megarec.models.shape import input_shape

        weights = Weights(dense=self.dense, tables=self.tables)
        shape = input_shape(fields, self.model)
        return LocalModel(self.model, shape, weights, item_side=item_side, name=name or self.model.name, device=device)


def main() -> None:
    """Runs `megarec-evaluate`."""
    run("megarec-evaluate", EvaluateConfig, measure, about=__doc__, ready={"protocol": PROTOCOLS})


def measure(config: EvaluateConfig) -> None:
    """Measures everything asked for, prints the table and writes the files.

    Raises:
        UserError: a model cannot be read, the models belong to different datasets or read histories of different
            lengths, or the dataset cannot serve the protocol.
    """
    from megarec.base.device import require_device
    from megarec.cli.evaluation_report import print_tables, write_results
    from megarec.inference.baselines.oracle import read_oracle
    from megarec.inference.baselines.suite import fit_baselines
    from megarec.inference.evaluate import Result, evaluate

    require_device(config.device)
    opened = {name: open_trained(Path(path)) for name, path in named(config.models).items()}
    dataset = dataset_of(opened.values(), config.data)
    protocol = protocol_of(opened.values(), config.protocol)
    protocol.check(dataset)
    rows: list[tuple[Result, dict[str, Any]]] = []

    def add(predictor: "Predictor", **facts: Any) -> None:
        result = evaluate(predictor, dataset, protocol, max_users=config.max_users)
        rows.append((result, facts))

    item_side = dataset.item_side()
    for (name, trained), path in zip(opened.items(), config.models, strict=True):
        model = trained.local_model(dataset.fields, item_side, name=name, device=config.device)
        add(model, run=path, step=trained.step, seed=trained.seed)
    for baseline in fit_baselines(dataset, config.baseline) if config.baselines else ():
        add(baseline)
    if config.oracle:
        add(read_oracle(Path(config.oracle), dataset))
    print_tables([result for result, _ in rows])
    if config.output:
        facts = {"data": str(dataset.path), "max_users": config.max_users, "baseline": plain(config.baseline)}
        write_results(Path(config.output), rows, facts=facts)


def named(paths: Sequence[str]) -> dict[str, str]:
    """Paths by what their rows are called: the directory's name, or the path as given where two have one name."""
    last = [Path(path).resolve().name for path in paths]
    return {name if last.count(name) == 1 else path: path for name, path in zip(last, paths, strict=True)}


def protocol_of(models: Collection[Trained], protocol: Protocol) -> Protocol:
    """`protocol` with the window of `models` where it leaves it to them.

    Raises:
        UserError: they read histories of different lengths.
    """
    windows = sorted({trained.max_history_events for trained in models})
    if protocol.max_history_events is not None or not windows:
        if windows:
            protocol.say_of_longer_histories(windows[0])
        return protocol
    if len(windows) > 1:
        what = f"the models read {' and '.join(map(str, windows))} events of a history, and one table has one protocol"
        raise UserError(what, where="model", fix="Give protocol.max_history_events=...")
    return replace(protocol, max_history_events=windows[0])


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
        max_history_events=config.max_history_events,
        is_checkpoint=True,
        seed=config.seed,
        data=config.data,
        evaluation=_last_evaluation(path, checkpoint.step),
    )


def dataset_of(models: Collection[Trained], data: str | None) -> "Dataset":
    """The dataset at `data`, or the one that all `models` were trained on.

    Raises:
        UserError: there is none, or more than one.
    """
    from megarec.data.dataset import open_dataset

    datasets = {data} if data else {trained.data for trained in models}
    if None in datasets:
        raise UserError("a bundle does not say which dataset to use", fix="Give data=...")
    if len(datasets) > 1:
        raise UserError(f"the models were trained on {len(datasets)} datasets", where="model", fix="Give data=...")
    return open_dataset(datasets.pop() or "")


def _last_evaluation(path: Path, step: int) -> dict[str, Any]:
    """What training measured last up to `step`, from the `evaluations.jsonl` of the run that `path` is or lies in."""
    for directory in (path, *path.resolve().parents[:2]):
        done = [record for record in read_records(directory / "evaluations.jsonl") if record["step"] <= step]
        if done:
            return dict(done[-1]["metrics"])
    return {}


if __name__ == "__main__":
    main()
