"""Known numbers on real data: the whole road from the publisher's file to the metric, to the last digit."""

import pytest
from megarec_tools.make_shards.config import MakeShardsConfig
from megarec_tools.make_shards.pipeline import make_shards

from megarec.data.dataset import Dataset
from megarec.inference.baselines.next_item import Popularity, TrainEvents
from megarec.inference.baselines.suite import train_blocks
from megarec.inference.evaluate import evaluate
from megarec.metrics.protocol import PROTOCOLS
from tests.real_data import data_file


@pytest.fixture(scope="module")
def movielens_1m(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """6,040 users and 3,416 items in time order."""
    log = str(data_file("ml-1m_sas_sequences.txt.gz"))
    output = str(tmp_path_factory.mktemp("ml-1m") / "data")
    return make_shards(MakeShardsConfig(input=log, output=output, schema="sequences", num_processes=1))


# Hits of 6,040 users, counted by a script of twenty lines that shares no code with this project: items by falling
# count without the last events, equal ones by their number in the file.
@pytest.mark.parametrize(
    ("name", "hits", "ndcg"),
    [
        ("full_filter", {"hr@10": 219, "hr@50": 843, "hr@200": 2061}, 0.017817954850680977),
        ("hstu_public", {"hr@10": 185, "hr@50": 771, "hr@200": 1950}, 0.0145749314636075),
    ],
)
def test_popularity_on_movielens_1m(movielens_1m: Dataset, name: str, hits: dict[str, int], ndcg: float) -> None:
    events = TrainEvents.gather(train_blocks(movielens_1m, title="read"), num_items=movielens_1m.num_items + 1)
    found = evaluate(Popularity.most_popular(events), movielens_1m, PROTOCOLS[name]).flat()
    assert {metric: round(found[metric] * 6040, 6) for metric in hits} == hits
    assert found["ndcg@10"] == pytest.approx(ndcg, rel=1e-12)
