"""What there is to learn: history beats the last event, the last event beats popularity, the truth beats all."""

import numpy as np
import numpy.typing as npt
import pytest
from megarec_tools.make_log.catalog import Catalog, make_catalog
from megarec_tools.make_log.config import MakeLogConfig
from megarec_tools.make_log.draws import Draws
from megarec_tools.make_log.oracle import best_items, find_heads
from megarec_tools.make_log.process import Listens, make_listens
from sklearn.metrics import roc_auc_score

NUM_ITEMS = 600


@pytest.fixture(scope="module")
def world() -> tuple[Catalog, Listens]:
    config = MakeLogConfig(output="", num_users=2_000, num_events=200_000, num_items=NUM_ITEMS)
    draws = Draws(config.seed)
    catalog = make_catalog(config, draws)
    return catalog, make_listens(config, catalog, draws, np.arange(2_000), advance=lambda _: None)


def mean_ndcg(scores: npt.NDArray[np.float64], target: npt.NDArray[np.int64]) -> float:
    rank = 1 + (scores > np.take_along_axis(scores, target[:, None], axis=1)).sum(axis=1)
    return float(np.where(rank <= 10, 1.0 / np.log2(rank + 1.0), 0.0).mean())


def test_next_item(world: tuple[Catalog, Listens]) -> None:
    catalog, listens = world
    user, item, last = listens.event_user, listens.item, listens.last_event
    target, known = item[last], np.ones(len(item), dtype=bool)
    known[last] = False
    popularity = np.bincount(item[known], minlength=NUM_ITEMS) / known.sum()

    def follow(lag: int) -> npt.NDArray[np.float64]:
        """p(item | the item `lag` events before), for each user's last event."""
        same = (user[lag:] == user[:-lag]) & known[lag:]
        counts = np.zeros((NUM_ITEMS, NUM_ITEMS))
        np.add.at(counts, (item[:-lag][same], item[lag:][same]), 1.0)
        p = (counts + 20.0 * popularity) / (counts.sum(axis=1, keepdims=True) + 20.0)
        before = np.maximum(last - lag, 0)
        return np.where((user[before] == user[last])[:, None], p[item[before]], popularity)

    tops, p = best_items(catalog, find_heads(catalog), listens.last)
    truth = np.zeros((len(last), NUM_ITEMS))
    np.put_along_axis(truth, tops, p, axis=1)
    popular = mean_ndcg(np.broadcast_to(popularity, truth.shape), target)
    markov = mean_ndcg(follow(1), target)
    history = mean_ndcg(sum((follow(lag) for lag in range(1, 7)), np.zeros(truth.shape)), target)
    oracle = mean_ndcg(truth, target)
    assert 1.5 * popular < markov
    assert 1.5 * markov < history
    assert 1.3 * history < oracle
    discount = 1.0 / np.log2(np.arange(2, 12))
    assert abs(oracle - float((p[:, :10] @ discount).mean())) < 4 * 0.4 / np.sqrt(len(last))


def test_feedback(world: tuple[Catalog, Listens]) -> None:
    _, listens = world
    user, item, last = listens.event_user, listens.item, listens.last_event
    listened = (listens.ratio >= 50).astype(float)
    known = np.ones(len(item), dtype=bool)
    known[last] = False

    def rate(key: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        hits, counts = (np.bincount(key[known], w, minlength=key.max() + 1) for w in (listened[known], None))
        return np.asarray((hits + 6.3) / (counts + 10.0))[key[last]]

    truth = roc_auc_score(listened[last], listens.p_listened)
    assert roc_auc_score(listened[last], rate(item)) < truth - 0.12
    assert roc_auc_score(listened[last], rate(user)) < truth - 0.12
    assert truth > 0.78
