"""How many steps read every training history once: settings of megarec-train as yaml come in, a number goes out.

Packs are never quite full, so that an epoch is a few steps more than this.
"""

import sys
from typing import Any

import numpy as np
import yaml

from megarec.base.errors import run_command
from megarec.data.dataset import open_dataset
from megarec.data.reader import BlockReader


def steps_per_epoch(settings: dict[str, Any]) -> int:
    stream = settings["stream"]
    blocks = BlockReader(open_dataset(settings["data"]), "train")
    num_tokens = 0
    for number in range(blocks.num_blocks):
        num_targets = np.diff(blocks.read(number).offsets) - 1  # the first event has nothing before it
        num_tokens += int(np.clip(num_targets, 0, stream["max_history_events"]).sum())
    return max(1, round(num_tokens / (stream["tokens_per_pack"] * stream["lanes"] * stream["packs_per_lane"])))


if __name__ == "__main__":
    run_command(lambda: print(steps_per_epoch(yaml.safe_load(sys.stdin))))
