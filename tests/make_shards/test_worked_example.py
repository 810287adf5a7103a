"""The worked example of docs/data_format.md is what the command does."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from megarec.data.block import decode_block
from megarec.data.dataset import open_dataset
from megarec.data.tar import index_shard

DOCUMENT = Path(__file__).parents[2] / "docs/data_format.md"


def test_the_worked_example_is_true(tmp_path):
    example = DOCUMENT.read_text().split("## A worked example")[1]
    (log,) = re.findall(r"```csv\n(.*?)```", example, re.DOTALL)
    (schema,) = re.findall(r"```yaml\n(.*?)```", example, re.DOTALL)
    (command,) = re.findall(r"```\nmegarec-make-shards (.*?)\n```", example)
    (printed,) = re.findall(r"```text\n(.*?)```", example, re.DOTALL)
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "music.yaml").write_text(schema)
    done = subprocess.run(
        [sys.executable, "-m", "megarec_tools.make_shards.command", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == printed
    dataset = open_dataset(tmp_path / "my_data")
    for split, text in zip(("train", "eval"), re.findall(r"```json\n(.*?)```", example, re.DOTALL), strict=True):
        (shard,) = dataset.shards_of(split)
        path = dataset.shard_path(shard)
        ((offset, size),) = index_shard(path)
        block = decode_block(path.read_bytes()[offset : offset + size], where="example")
        found = {"user": block.user, "offsets": block.offsets, **block.columns}
        found |= {"query_time": block.query_time, "target_offsets": block.target_offsets}
        found |= {f"targets/{name}": column for name, column in block.target_columns.items()}
        for name, values in json.loads(text).items():
            assert found[name].tolist() == values, (split, name)
    rows = [line.strip("| ").split(" | ") for line in example.splitlines() if re.match(r"\| \d", line)]
    items = pq.read_table(dataset.path / "items.parquet").to_pylist()
    assert [[str(value) for value in item.values()] for item in items] == rows
    (reject,) = pq.read_table(dataset.path / "rejects.parquet").to_pylist()
    assert reject == {"file": "log.csv", "row": 7, "reason": "'when' is not a time"}
