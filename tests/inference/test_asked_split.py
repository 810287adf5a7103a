"""A protocol asks about the split it names: the second-to-last event of some users, or the last one of all."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from megarec_tools.make_shards.config import MakeShardsConfig, SplitConfig
from megarec_tools.make_shards.pipeline import make_shards

from megarec.base.errors import UserError
from megarec.data.dataset import Dataset
from megarec.inference.evaluate import evaluate
from megarec.inference.histories import Histories, Prediction, Targets
from megarec.metrics.protocol import PROTOCOLS, Protocol

SEQUENCES = [list(range(user, user + 8)) for user in range(1, 13)]  # the user u has the items u to u + 7


@dataclass
class Memory:
    """Scores nothing and remembers the last item of each history and its target, in raw ids."""

    raw: list[int | str | None]
    name: str = "memory"
    seen: set[tuple[int, int]] = field(default_factory=set)

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        last = histories.fields["item"][histories.cu_seqlens[1:] - 1].tolist()
        self.seen |= {
            (self.raw[a], self.raw[b])  # type: ignore[misc]
            for a, b in zip(last, targets.fields["item"].tolist(), strict=True)
        }
        return Prediction(scores=torch.zeros(len(last), len(self.raw)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder: Path = tmp_path_factory.mktemp("sequences")
    (folder / "log.txt").write_text("".join(" ".join(map(str, items)) + "\n" for items in SEQUENCES))
    split = SplitConfig(validation_users=5)
    config = MakeShardsConfig(
        input=str(folder / "log.txt"), output=str(folder / "data"), schema="sequences", split=split, num_processes=1
    )
    return make_shards(config)


def test_each_split_is_asked_about_its_own_targets(dataset: Dataset) -> None:
    evaluated, validated = Memory(dataset.item_raw()), Memory(dataset.item_raw())
    assert evaluate(evaluated, dataset, Protocol()).counts["users"] == 12
    assert evaluate(validated, dataset, Protocol(split="valid")).counts["users"] == 5
    assert evaluated.seen == {(items[-2], items[-1]) for items in SEQUENCES}
    assert len(validated.seen) == 5
    assert validated.seen < {(items[-3], items[-2]) for items in SEQUENCES}


def test_what_is_kept_from_training_does_not_serve_the_public_protocol(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"'hstu_public' wants split.validation_users=0, the dataset has 5"):
        evaluate(Memory(dataset.item_raw()), dataset, PROTOCOLS["hstu_public"])
