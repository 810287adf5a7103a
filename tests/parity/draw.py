"""Draws the pictures of `docs/parallelism.md` and writes its tables.

python -m tests.parity.draw docs/pictures
"""

import sys
import tempfile
from pathlib import Path

from tests.inference.synthetic import write_world
from tests.parity.pictures.blocks import draw_block
from tests.parity.pictures.page import BLOCKS, Traces, insert, tables, trace_all
from tests.parity.pictures.replicas import draw_replicas
from tests.parity.pictures.rows import draw_full_softmax, draw_tables
from tests.parity.pictures.stages import draw_stages
from tests.parity.trace import trace_run

SPLIT = {
    "tensor": "Tensor parallelism: heads and channels over 2 ranks",
    "sequence": "Tensor and sequence parallelism: tokens between the split maps too",
    "context by heads": "Context parallelism by heads: tokens, and in attention heads, over 2 ranks",
    "context in a ring": "Context parallelism in a ring: tokens over 2 ranks, keys pass by",
}


def draw(folder: Path, data: Path, traces: Traces) -> None:
    """Writes every picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"argus": traces["data", "argus"][0], "hstu": trace_run(data, "dp2", "hstu")[0]}
    for name, title in SPLIT.items():
        path = folder / f"{name.replace(' ', '_')}.png"
        draw_block(path, title, {model: traces[name, model] for model in BLOCKS}, whole)
    schedules = {
        "One chunk a stage (1F1B)": traces["pipeline", "argus"],
        "Two chunks a stage (layout.virtual=2, interleaved)": traces["virtual stages", "argus"],
    }
    draw_stages(folder / "pipeline.png", schedules)
    sums = {
        "layout.overlap=false": traces["no overlap", "argus"],
        "layout.overlap=true (the default)": traces["data", "argus"],
        "layout.zero1=true": traces["ZeRO-1", "argus"],
    }
    draw_replicas(folder / "data.png", sums)
    draw_tables(folder / "tables.png", traces["data", "argus"])
    draw_full_softmax(folder / "full_softmax.png", traces["full softmax", "argus"])


def main() -> None:
    folder = Path(sys.argv[1])
    page = folder.parent / "parallelism.md"
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        write_world(data, num_users=90)
        traces = trace_all(data)
        draw(folder, data, traces)
    page.write_text(insert(page.read_text(encoding="utf-8"), tables(traces)), encoding="utf-8")


if __name__ == "__main__":
    main()
