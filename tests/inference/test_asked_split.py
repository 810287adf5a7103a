"""A protocol asks what it says: about the split it names, at its own time, about the targets it ranks."""

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
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


CUT, GAP = 1_000_000, 1800


@dataclass
class Witness:
    """Keeps the last questions and targets; likes items by their raw number."""

    raw: list[int | str | None]
    name: str = "witness"
    asked: Histories | None = None
    targets: Targets | None = None

    def predict(self, histories: Histories, targets: Targets) -> Prediction:
        self.asked, self.targets = histories, targets
        scores = torch.tensor([[float(raw or 0) for raw in self.raw]])  # type: ignore[arg-type]
        return Prediction(scores=scores.repeat(len(histories.user), 1))


def yambda_log(folder: Path, *, ratio: int) -> Dataset:
    """Two users that listen to the tracks 1 to 4 before the cut, and what they do in the gap and after it."""
    rows = [(1, item, CUT - 10_000 + item, True, 80) for item in (1, 2, 3, 4)]
    rows += [(2, item, CUT - 10_000 + item, item == 4, 80) for item in (1, 2, 3, 4)]
    rows += [(1, 1, CUT - GAP, False, 80), (1, 2, CUT - 1, False, 80)]  # in the gap: nobody's
    rows += [(1, item, CUT + second, False, ratio) for second, item in enumerate((4, 4, 77))]
    rows += [(user, 3, CUT, False, 10) for user in (1, 2)]
    columns = ["uid", "item_id", "timestamp", "is_organic", "played_ratio_pct"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / "log.parquet")
    split = SplitConfig(rule="global_time", cut=str(CUT), gap=GAP)
    return make_shards(
        MakeShardsConfig(
            input=str(folder / "log.parquet"),
            output=str(folder / "data"),
            schema="yambda",
            split=split,
            num_processes=1,
        )
    )


def test_yambda_asks_at_the_cut_and_ranks_what_was_listened_to(tmp_path: Path) -> None:
    dataset = yambda_log(tmp_path, ratio=50)
    witness = Witness(dataset.item_raw())
    result = evaluate(witness, dataset, PROTOCOLS["yambda"])
    assert witness.asked is not None
    assert witness.targets is not None
    assert witness.asked.timestamp.max() < CUT - GAP
    assert witness.asked.query_time.tolist() == [CUT, CUT]
    last = witness.asked.cu_seqlens[1:] - 1
    assert witness.asked.query_fields["is_organic"].tolist() == witness.asked.fields["is_organic"][last].tolist()
    assert set(witness.asked.query_fields["is_organic"].tolist()) == {2}  # that of the targets is 1
    assert len(witness.targets.timestamp) == 5
    # the first user wants {4, 77}: 4 is on top and 77 unknown; the second listened to nothing and is not ranked
    assert {name: result.counts[name] for name in ("users", "ranked_users", "ranked_targets", "unknown_targets")} == {
        "users": 2,
        "ranked_users": 1,
        "ranked_targets": 2,
        "unknown_targets": 1,
    }
    assert result.flat()["recall@10"] == 1 / 2
    assert result.flat()["coverage@10"] == 1.0  # the four tracks of train


def test_no_target_that_is_ranked_is_an_error(tmp_path: Path) -> None:
    dataset = yambda_log(tmp_path, ratio=49)
    with pytest.raises(UserError, match="no target has the flag 'listened'"):
        evaluate(Witness(dataset.item_raw()), dataset, PROTOCOLS["yambda"])
