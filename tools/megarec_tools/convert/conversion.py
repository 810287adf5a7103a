"""Checkpoint to bundle, through a parity gate: a bundle that answers differently is not left behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megarec.base.errors import UserError
from megarec.base.files import new_directory
from megarec.base.progress import say
from megarec.cli.evaluate import Trained, dataset_of, open_trained
from megarec.data.dataset import Dataset
from megarec.data.evaluation import evaluation_batches
from megarec.inference.bundle import BundleConfig, open_bundle, write_bundle
from megarec.inference.evaluate import ask
from megarec.inference.histories import Histories, Prediction, Targets
from megarec.inference.model import LocalModel
from megarec.inference.recommend import Recommender
from megarec.metrics.protocol import Protocol
from megarec_tools.convert.command import ConvertConfig

USERS_AT_ONCE = 16


def convert(config: ConvertConfig) -> None:
    """Writes the bundle and prints what it holds and how far it is from the checkpoint.

    Raises:
        UserError: the checkpoint or the dataset is unusable, or the bundle differs by more than the tolerance.
    """
    trained = open_trained(Path(config.checkpoint))
    if not trained.is_checkpoint:
        raise UserError("this is a bundle already", where=config.checkpoint, fix="Give a run directory")
    dataset = dataset_of([trained], config.data)
    # the bundle gets its name only after the gate
    with new_directory(Path(config.output)) as staging:
        write_bundle(
            staging, bundle_config(trained, dataset), dense=trained.dense, tables=trained.tables, dataset=dataset
        )
        difference, num_users = compare(trained, staging, dataset, num_users=config.check_users)
        if not difference <= config.tolerance:
            raise UserError(
                f"bundle and checkpoint differ by {difference:.2e}, allowed is {config.tolerance:.0e}",
                where=config.output,
                fix="Nothing was written",
            )
        num_bytes = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    say(f"bundle of step {trained.step:,} written to {config.output}: {num_bytes / 1e6:,.1f} MB")
    say(f"largest difference to the checkpoint on {num_users} users: {difference:.2e} (allowed {config.tolerance:.0e})")


def bundle_config(trained: Trained, dataset: Dataset) -> BundleConfig:
    """What the bundle's `config.json` will say."""
    return BundleConfig(
        model=trained.model,
        schema=dataset.schema,
        fields=dataset.fields,
        has_timestamps=dataset.has_timestamps,
        max_history_events=trained.max_history_events,
        step=trained.step,
        evaluation=trained.evaluation,
        split=dataset.split,
    )


def compare(trained: Trained, bundle: Path, dataset: Dataset, *, num_users: int) -> tuple[float, int]:
    """The largest difference between checkpoint and bundle over scores and logits, and on how many users.

    A difference is divided by the largest magnitude of its kind. The bundle goes the whole way of a user's bundle.

    Raises:
        UserError: the eval split has nobody to compare on.
    """
    from_checkpoint = trained.local_model(dataset.fields, dataset.item_side())
    from_bundle = Recommender(open_bundle(bundle)).model
    gaps, done = [], 0
    for histories, targets in _questions(dataset, trained.max_history_events):
        gaps.append(_difference(from_checkpoint, from_bundle, histories, targets))
        done += len(histories.user)
        if done >= num_users:
            break
    if not done:
        raise UserError("the eval split has no history to compare on", where=str(dataset.path))
    return float(np.max(gaps)), done


def _questions(dataset: Dataset, max_history_events: int) -> Any:
    protocol = Protocol(max_history_events=max_history_events)
    context = [name for name, info in dataset.fields.items() if info.role == "context"]
    batches = evaluation_batches(dataset, max_history_events=max_history_events, users_per_batch=USERS_AT_ONCE)
    for batch in batches:
        users = np.flatnonzero(np.diff(batch.cu_seqlens))
        if len(users):
            yield ask(batch, protocol, users, context=context)


def _difference(one: LocalModel, other: LocalModel, histories: Histories, targets: Targets) -> float:
    first, second = _outputs(one.predict(histories, targets)), _outputs(other.predict(histories, targets))
    if first.keys() != second.keys():
        return float("inf")
    return float(np.max([_relative_gap(first[name], second[name]) for name in first]))  # nan stays nan


def _outputs(prediction: Prediction) -> Mapping[str, Tensor]:
    assert prediction.scores is not None
    return {"scores": prediction.scores, **prediction.feedback}


def _relative_gap(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
