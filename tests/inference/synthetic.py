"""A tiny dataset directory, written as the shards' own writers write it, and random weights for any model on it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from megarec.base.files import sha256_of
from megarec.base.jagged import lengths_to_offsets
from megarec.base.random import derive_key
from megarec.base.random_torch import normal_torch
from megarec.data.block import Block, encode_block
from megarec.data.dataset import Dataset, FieldInfo, ShardInfo, open_dataset, write_dataset
from megarec.data.schema import FieldSchema, Schema
from megarec.data.tar import write_shard
from megarec.inference.model import LocalModel, Weights
from megarec.layers.config import HeadsConfig, HstuBlockConfig, TransformerBlockConfig
from megarec.models.argus.config import ArgusConfig
from megarec.models.choice import ModelConfig
from megarec.models.hstu.config import HstuConfig
from megarec.models.registry import build_model
from megarec.models.shape import input_shape
from megarec.parallel.parts import local_parts
from megarec.parallel.placement import initialize

NUM_ITEMS = 30  # raw ids are 1000 + 7 * id
MAX_EVENTS = 12
FIELDS = {
    "item": FieldInfo(name="item", role="item", kind="id", num_ids=NUM_ITEMS + 1),
    "artist": FieldInfo(name="artist", role="item_side", kind="id", num_ids=6),
    "tags": FieldInfo(name="tags", role="item_side", kind="categorical", num_ids=5, slots=2),
    "device": FieldInfo(name="device", role="context", kind="categorical", num_ids=4),
    "listened": FieldInfo(name="listened", role="feedback", kind="flag", num_ids=3),
    "ratio": FieldInfo(name="ratio", role="feedback", kind="numeric", num_ids=5, edges=(10.0, 50.0, 90.0)),
}
SCHEMA = Schema(
    name="tiny",
    user="uid",
    item="track",
    timestamp="time",
    timestamp_unit="s",
    fields={
        "artist": FieldSchema(column="artist", role="item_side", kind="id"),
        "tags": FieldSchema(column="tags", role="item_side", kind="categorical", max_values=2),
        "device": FieldSchema(column="device", role="context", kind="categorical"),
        "listened": FieldSchema(column="played", role="feedback", kind="flag", at_least=50.0),
        "ratio": FieldSchema(column="played", role="feedback", kind="numeric", edges=(10.0, 50.0, 90.0)),
    },
)


def raw_item(item: int) -> int:
    return 1000 + 7 * item


def make_events(rng: np.random.Generator, num_events: int) -> dict[str, np.ndarray]:
    weights = 1.0 / np.arange(1, NUM_ITEMS + 1)
    item = rng.choice(np.arange(1, NUM_ITEMS + 1), num_events, p=weights / weights.sum())
    return {
        "item": item.astype(np.int32),
        "artist": (1 + item % 5).astype(np.int32),
        "tags": np.stack([1 + item % 4, np.where(item % 3, -1, 2)], axis=1).astype(np.int32),
        "device": rng.integers(0, 4, num_events).astype(np.int32),
        "listened": rng.integers(0, 3, num_events).astype(np.int32),
        "ratio": rng.integers(0, 5, num_events).astype(np.int32),
        "timestamp": np.sort(rng.integers(10**6, 2 * 10**6, num_events)),
    }


def write_world(
    path: Path, *, num_users: int = 24, num_targets: int = 1, seed: int = 0, unknown_targets: bool = False
) -> Dataset:
    """Every user's last `num_targets` events are targets; the user 0 has none, the user 1 no history.

    With `unknown_targets`, the items of the last two targets of every third user are unknown.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 20, num_users)
    lengths[1] = 0
    histories = [make_events(rng, n) for n in lengths]
    targets = [make_events(rng, 0 if user == 0 else num_targets) for user in range(num_users)]
    for target in targets[2::3] if unknown_targets else ():
        target["item"][-2:] = 0
    for history, target in zip(histories, targets, strict=True):
        target["timestamp"] = target["timestamp"] + 10**6
        history["timestamp"] = history["timestamp"].astype(np.int64)
    (path / "train").mkdir(parents=True)
    (path / "eval").mkdir()
    (path / "vocab").mkdir()
    shards = []
    for split, first in (("train", 0), ("eval", 0)):
        blocks = []
        for start in range(first, num_users, 10):
            part = slice(start, start + 10)
            blocks.append(_block(range(num_users)[part], histories[part], targets[part] if split == "eval" else None))
        file = f"{split}/shard-000000.tar"
        num_blocks, num_bytes = write_shard(path / file, [encode_block(block) for block in blocks])
        num_events = int(lengths.sum())
        shards.append(
            ShardInfo(
                file=file,
                split=split,  # type: ignore[arg-type]
                users=num_users,
                events=num_events,
                targets=0 if split == "train" else (num_users - 1) * num_targets,
                blocks=num_blocks,
                bytes=num_bytes,
                sha256=sha256_of(path / file),
            )
        )
    _write_catalog(path, histories)
    pl.DataFrame({"user": range(num_users), "raw": [f"u{i}" for i in range(num_users)]}).write_parquet(
        path / "vocab" / "user.parquet"
    )
    dataset = Dataset(
        path=path,
        schema=SCHEMA,
        fields=FIELDS,
        split={"rule": "leave_last_out"},
        counts={"users": num_users},
        shards=shards,
        has_timestamps=True,
    )
    write_dataset(dataset)
    return open_dataset(path)


def _block(users: range, histories: list[dict[str, Any]], targets: list[dict[str, Any]] | None) -> Block:
    def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    extra: dict[str, Any] = {}
    if targets is not None:
        extra = {
            "query_time": np.array([t["timestamp"][0] if len(t["timestamp"]) else 0 for t in targets], np.int64),
            "target_offsets": lengths_to_offsets(np.array([len(t["item"]) for t in targets])),
            "target_columns": joined(targets),
        }
    offsets = lengths_to_offsets(np.array([len(h["item"]) for h in histories]))
    return Block(user=np.array(users, dtype=np.int64), offsets=offsets, columns=joined(histories), **extra)


def _write_catalog(path: Path, histories: list[dict[str, np.ndarray]]) -> None:
    ids = np.arange(1, NUM_ITEMS + 1)
    counts = np.bincount(np.concatenate([h["item"] for h in histories]), minlength=NUM_ITEMS + 1)[1:]
    pl.DataFrame(
        {
            "id": ids.astype(np.int32),
            "raw": [raw_item(i) for i in ids],
            "count": counts.astype(np.int64),
            "first_seen": ids.astype(np.int64),
            "last_seen": ids.astype(np.int64),
            "artist": (1 + ids % 5).astype(np.int32),
            "tags": [[int(1 + i % 4), -1 if i % 3 else 2] for i in ids],
        },
        schema_overrides={"tags": pl.List(pl.Int32)},
    ).write_parquet(path / "items.parquet")
    vocabularies = {
        "artist": [f"artist {i}" for i in range(1, 6)],
        "tags": [f"tag {i}" for i in range(1, 5)],
        "device": ["phone", "desktop", "speaker"],
    }
    for name, raw in vocabularies.items():
        frame = pl.DataFrame({"id": range(1, len(raw) + 1), "raw": raw}, schema_overrides={"id": pl.Int32})
        frame.write_parquet(path / "vocab" / f"{name}.parquet")


HEADS = HeadsConfig(query_width=8, hidden_width=12)
CONFIGS: dict[str, ModelConfig] = {
    "argus": ArgusConfig(
        width=16, table_width=8, num_layers=2, max_positions=MAX_EVENTS, time_gap_buckets=5, heads=HEADS,
        block=TransformerBlockConfig(num_heads=2),
    ),
    "hstu": HstuConfig(
        width=8, table_width=8, num_layers=2, max_positions=MAX_EVENTS, heads=HEADS,
        block=HstuBlockConfig(num_heads=2, qk_head_width=4, v_head_width=4, num_time_buckets=16),
    ),
    "prefix": HstuConfig(
        width=8, table_width=8, num_layers=2, max_positions=MAX_EVENTS, heads=HEADS, prefix_fields=("device",),
        block=HstuBlockConfig(num_heads=2, qk_head_width=4, v_head_width=4, num_time_buckets=16),
    ),
    "prefix, item_action": ArgusConfig(
        width=16, table_width=8, num_layers=2, max_positions=MAX_EVENTS, heads=HEADS, prefix_fields=("device",),
        token_layout="item_action", block=TransformerBlockConfig(num_heads=2),
    ),
    "item_action": HstuConfig(
        width=8, table_width=8, num_layers=2, max_positions=MAX_EVENTS, heads=HEADS, token_layout="item_action",
        block=HstuBlockConfig(num_heads=2, qk_head_width=4, v_head_width=4, num_time_buckets=16),
    ),
    "context_item_feedback": ArgusConfig(
        width=16, table_width=8, num_layers=2, max_positions=MAX_EVENTS, heads=HEADS,
        token_layout="context_item_feedback", block=TransformerBlockConfig(num_heads=2),
    ),
}  # fmt: skip


def random_weights(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Weights:
    shape = input_shape(FIELDS, config)
    model = build_model(config, shape, local_parts()).to(dtype)
    initialize(model, seed)
    tables = {}
    for name, num_rows in shape.tables.items():
        counters = torch.arange(num_rows * config.table_width)
        values = normal_torch(derive_key(seed, "table", name), counters)
        tables[name] = values.view(num_rows, config.table_width).to(dtype)
    return Weights(dense={n: p.detach().clone() for n, p in model.named_parameters()}, tables=tables)


def make_model(config: ModelConfig, dataset: Dataset, **settings: Any) -> LocalModel:
    shape = input_shape(dataset.fields, config)
    return LocalModel(config, shape, random_weights(config), item_side=dataset.item_side(), **settings)
