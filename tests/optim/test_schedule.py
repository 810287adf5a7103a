import math

import pytest

from megarec.base.errors import UserError
from megarec.optim.config import OptimizerSettings
from megarec.optim.schedule import learning_rate


def rates(num_steps: int, **settings: object) -> list[float]:
    built = OptimizerSettings(lr=1.0, **settings)
    return [learning_rate(step, built, num_steps=num_steps) for step in range(num_steps)]


def test_warmup_rises_linearly_and_stays() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_linear_ends_at_the_smallest_rate() -> None:
    assert rates(6, schedule="linear", warmup_steps=1, min_lr=0.5) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])


def test_cosine_is_half_a_period() -> None:
    want = [0.5 + 0.5 * math.cos(math.pi * (step + 1) / 5) for step in range(5)]
    assert rates(5, schedule="cosine") == pytest.approx(want)
    assert want[-1] == 0.0


def test_wsd_is_constant_until_the_decay() -> None:
    assert rates(8, schedule="wsd", warmup_steps=2, decay_steps=4) == pytest.approx(
        [0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]
    )


def test_steps_beyond_the_run_keep_the_last_rate() -> None:
    settings = OptimizerSettings(lr=1.0, schedule="linear", min_lr=0.125)
    assert learning_rate(1000, settings, num_steps=10) == 0.125


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": math.nan}, {"beta1": 1.0}, {"warmup_steps": -1}, {"min_lr": 1.0, "lr": 0.1}],
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}: "):
        OptimizerSettings(**wrong)
