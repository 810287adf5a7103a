"""FP8 learns what bf16 learns.

The rule: with the same seed and data, the mean loss of the last steps in FP8 is no farther from that in bf16 than two
seeds in bf16 are from each other (the largest less the smallest of three, measured here).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarec.parallel.fp8 import scaled
from megarec.parallel.groups import ProcessInfo
from megarec.train.config import TrainConfig
from tests.parity.layout_runs import train_losses
from tests.ranks import run_ranks
from tests.train.runs import SMALL_ARGUS, SMALL_HSTU, make_config

STEPS, LAST = 60, 15
MODELS = {"argus": SMALL_ARGUS, "hstu": SMALL_HSTU}
BF16: dict[str, Any] = {"precision": "bf16"}
FP8: dict[str, Any] = {"precision": "fp8_current", "layout": {"linears": "fp8_reference"}}
STREAM = {"tokens_per_pack": 128, "lanes": 2, "pool_blocks": 1, "max_history_events": 12, "packs_per_lane": 1}


def forget_scale(x: Tensor, dtype: torch.dtype, *reduce_amax: Any) -> tuple[Tensor, Tensor]:
    return QUANTIZE(x, dtype, *reduce_amax)[0], torch.ones(())


QUANTIZE = scaled.quantize


def losses_of(process: ProcessInfo, config: TrainConfig, forgetful: bool = False) -> list[float]:
    if forgetful:
        scaled.quantize = forget_scale
    return train_losses(process, config)


def first_and_last(data: Path, name: str, seed: int, **settings: Any) -> tuple[float, float]:
    """The mean of the sum of the losses over the first steps, and over the last."""
    forgetful = settings.pop("forgetful", False)
    settings = {"num_steps": STEPS, "seed": seed, "stream": STREAM, "optimizer": {"lr": 5e-3}, **settings}
    config = make_config(data, data.parent / "run", model={**MODELS[name], "width": 32}, **settings)
    (losses,) = run_ranks(losses_of, 1, config, forgetful)
    total = torch.tensor(losses).view(STEPS, -1).sum(1)
    return float(total[:LAST].mean()), float(total[-LAST:].mean())


@pytest.mark.parametrize("name", MODELS)
def test_fp8_is_within_the_noise_of_seeds(parity_data: Path, name: str) -> None:
    runs = [first_and_last(parity_data, name, seed, **BF16) for seed in range(3)]
    ends = [last for _, last in runs]
    spread = max(ends) - min(ends)
    _, fp8 = first_and_last(parity_data, name, 0, **FP8)
    _, broken = first_and_last(parity_data, name, 0, **FP8, forgetful=True)
    print(f"{name}: bf16 {ends}, spread {spread:.4f}, FP8 {fp8:.4f}, without scales {broken:.4f}")
    assert min(first - last for first, last in runs) > 3 * spread  # it learns far more than seeds differ
    assert 0 < abs(fp8 - ends[0]) <= spread
    assert abs(broken - ends[0]) > spread  # the rule sees a scale that is forgotten
