"""A small log, and the log as plain lists per user."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from megarec_tools.make_log.config import MakeLogConfig
from megarec_tools.make_log.generator import make_log

SMALL: dict[str, Any] = {"num_users": 900, "num_items": 400, "num_events": 40_000, "events_per_file": 10_000}


def write_log(path: Path, **settings: Any) -> Path:
    make_log(MakeLogConfig(output=str(path), **{**SMALL, **settings}))
    return path


def read_events(path: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted(path.glob("events-*.parquet"))])


def by_user(events: pa.Table) -> dict[int, list[dict[str, Any]]]:
    users = defaultdict(list)
    for row in events.to_pylist():
        users[row["uid"]].append(row)
    return users
