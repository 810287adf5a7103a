"""Feedback metrics against scikit-learn, slow twins and hand examples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from megarec.metrics.feedback import (
    measure_auc,
    measure_calibration,
    measure_calibration_error,
    measure_grouped_auc,
    measure_normalized_entropy,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=40))
def test_auc_equals_the_share_of_won_pairs_and_sklearn(events: list[tuple[bool, int]]) -> None:
    label, score = np.array([e[0] for e in events]), np.array([float(e[1]) for e in events])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[label] for b in score[~label]]
    found = measure_auc(label, score)
    if not pairs:
        assert math.isnan(found)
        return
    assert found == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_auc_by_hand() -> None:
    assert measure_auc(np.array([0, 1, 1]), np.array([0.1, 0.2, 0.3])) == 1.0
    assert measure_auc(np.array([1, 0]), np.array([0.1, 0.2])) == 0.0
    assert measure_auc(np.array([1, 0, 1, 0]), np.zeros(4)) == 0.5
    assert math.isnan(measure_auc(np.array([], dtype=np.int64), np.array([])))
    with pytest.raises(ValueError, match="nan"):
        measure_auc(np.array([0, 1]), np.array([math.nan, 1.0]))


def test_grouped_auc_weighs_users_with_both_classes_by_their_events() -> None:
    generator = np.random.default_rng(0)
    user = generator.integers(0, 25, 300)
    label = generator.random(300) < user / 25  # users with one class only exist
    score = np.round(generator.random(300), 1)
    areas, weights = [], []
    for one in range(25):
        mine = user == one
        if 0 < label[mine].sum() < mine.sum():
            areas.append(roc_auc_score(label[mine], score[mine]))
            weights.append(mine.sum())
    assert len(areas) < 25
    found = measure_grouped_auc(label, score, user)
    assert found.value == pytest.approx(np.average(areas, weights=weights), abs=1e-12)
    assert found.count == len(areas)


def test_the_standard_error_of_grouped_auc_is_that_of_a_mean_when_users_weigh_the_same() -> None:
    user = np.repeat(np.arange(4), 3)
    label = np.tile([0, 0, 1], 4)
    score = np.array([1, 2, 3, 1, 2, 1.5, 1, 2, 0, 1, 2, 3.0])
    found = measure_grouped_auc(label, score, user)
    areas = [1.0, 0.5, 0.0, 1.0]
    assert found.value == np.mean(areas)
    assert found.standard_error == pytest.approx(np.std(areas, ddof=1) / 2)


def test_grouped_auc_without_such_users() -> None:
    assert math.isnan(measure_grouped_auc(np.array([1, 0]), np.array([0.1, 0.2]), np.array([3, 4])).value)


def test_normalized_entropy_is_loss_over_the_loss_of_the_constant_prior() -> None:
    label = np.array([1, 0, 0, 1, 0])
    probability = np.array([0.7, 0.2, 0.4, 0.9, 0.1])
    losses = -np.where(label, np.log(probability), np.log(1 - probability))
    expected = log_loss(label, probability) / log_loss(label, np.full(5, 0.4))
    assert measure_normalized_entropy(label, losses) == pytest.approx(expected, abs=1e-12)
    classes = np.array([7, 7, 3, 1])
    prior = np.array([0.5, 0.5, 0.25, 0.25])
    assert measure_normalized_entropy(classes, -np.log(prior)) == pytest.approx(1.0, abs=1e-12)
    assert math.isnan(measure_normalized_entropy(np.array([1, 1]), np.zeros(2)))


def test_calibration_by_hand() -> None:
    assert measure_calibration(np.array([1, 0, 0, 1]), np.array([0.5, 0.5, 0.5, 0.9])) == pytest.approx(1.2)
    assert math.isnan(measure_calibration(np.array([0, 0]), np.array([0.5, 0.5])))


def test_calibration_error_by_hand_and_by_twin() -> None:
    label, probability = np.array([0, 1, 1, 1]), np.array([0.2, 0.4, 0.9, 0.7])
    # Bins {0.2, 0.4} and {0.7, 0.9}: |0.3 - 0.5| and |0.8 - 1|.
    assert measure_calibration_error(label, probability, num_bins=2) == pytest.approx(0.2)
    generator = np.random.default_rng(1)
    probability = generator.random(1003)
    label = generator.random(1003) < probability**2
    order = np.argsort(probability)
    twin = sum(
        len(part) / 1003 * abs(probability[part].mean() - label[part].mean()) for part in np.array_split(order, 20)
    )
    assert measure_calibration_error(label, probability) == pytest.approx(twin, abs=1e-12)
    assert math.isnan(measure_calibration_error(np.array([]), np.array([])))
