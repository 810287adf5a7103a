"""`megarec-make-log`, put together: chunks of users to files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megarec.base.config import plain
from megarec.base.files import new_directory, sha256_of, write_json
from megarec.base.progress import bar, say, track
from megarec_tools.make_log import reaction
from megarec_tools.make_log.catalog import make_catalog
from megarec_tools.make_log.config import MakeLogConfig
from megarec_tools.make_log.draws import Draws, Ints
from megarec_tools.make_log.oracle import USERS_PER_GROUP, OracleFile
from megarec_tools.make_log.process import Listens, make_listens
from megarec_tools.make_log.writer import (
    DISLIKE,
    EVENT_TYPES,
    LIKE,
    LISTEN,
    ROW,
    UNDISLIKE,
    UNLIKE,
    TimeBuckets,
    to_timestamp,
)

LIKED_SHARE = 0.28  # of the items that become a favourite; likes are then 1.9 % of events, as in Yambda
DISLIKED_SHARE = 0.03  # of the items skipped at once
UNDISLIKED_SHARE = 0.2  # of dislikes, taken back at once


def make_log(config: MakeLogConfig) -> None:
    """Writes the log that `config` describes into the new folder `config.output`."""
    draws = Draws(config.seed)
    catalog = make_catalog(config, draws)
    with new_directory(Path(config.output)) as folder:
        buckets = TimeBuckets(folder, num_files=config.num_files, duration_seconds=config.duration_seconds)
        with (
            OracleFile(folder / "oracle.parquet", catalog, draws) as oracle,
            bar(title="making listens", total=config.num_events, unit=" events") as moving,
        ):
            for users in _chunks(config):
                listens = make_listens(config, catalog, draws, users, advance=moving.update)
                buckets.add(_rows(config, draws, listens))
                oracle.add(listens)
        counts = np.zeros(len(EVENT_TYPES), dtype=np.int64)
        paths = [folder / "oracle.parquet"]
        for number in track(range(config.num_files), title="writing files", unit=" files"):
            path, count = buckets.finish(number, catalog, draws)
            paths.append(path)
            counts += count
        summary = {
            # Where the log lies and how it was made in memory say nothing about what it is.
            "settings": {k: v for k, v in plain(config).items() if k not in ("output", "chunk_events")},
            "counts": dict(zip(EVENT_TYPES, counts.tolist(), strict=True)),
            "oracle": oracle.summary(),
            "files": {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths},
        }
        write_json(folder / "log.json", summary)
    say(f"{counts[LISTEN]:,} listens of {config.num_users:,} users in {config.num_files} files: {config.output}")


def _chunks(config: MakeLogConfig) -> Iterator[Ints]:
    mean = config.num_events / config.num_users
    size = max(1, int(config.chunk_events / mean / USERS_PER_GROUP)) * USERS_PER_GROUP
    for first in range(0, config.num_users, size):
        yield np.arange(first, min(first + size, config.num_users), dtype=np.int64)


def _rows(config: MakeLogConfig, draws: Draws, listens: Listens) -> npt.NDArray[np.void]:
    """The rows of the log for some listens, user by user; a like or dislike follows the listen it is about."""
    event = np.arange(len(listens.item))
    kind = np.full(len(event), LISTEN)
    if not config.listens_only:
        pair = listens.event_user * config.num_items + listens.item
        liked = draws.uniform("liked", pair) < LIKED_SHARE
        disliked = (listens.ratio == 0) & (draws.uniform("disliked", pair) < DISLIKED_SHARE)
        marks = {
            LIKE: liked & ~listens.was_favourite & (listens.ratio > reaction.FULL),
            UNLIKE: liked & listens.was_favourite & (listens.ratio < reaction.HALF),
            DISLIKE: disliked,
            UNDISLIKE: disliked & (draws.uniform("undisliked", pair) < UNDISLIKED_SHARE),
        }
        about = [np.flatnonzero(mark) for mark in marks.values()]
        kind = np.concatenate([kind, *(np.full(len(a), k) for k, a in zip(marks, about, strict=True))])
        event = np.concatenate([event, *about])
        order = np.lexsort([kind, event])
        event, kind = event[order], kind[order]
    rows = np.empty(len(event), dtype=ROW)
    rows["user"] = listens.event_user[event]
    rows["item"] = listens.item[event]
    rows["timestamp"] = to_timestamp(listens.time[event])
    rows["ratio"] = listens.ratio[event]
    rows["is_organic"] = listens.organic[event]
    rows["kind"] = kind
    return rows
