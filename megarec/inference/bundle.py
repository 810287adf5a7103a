"""The inference bundle: one directory with everything that answering needs, and nothing that can run code.

```
bundle/
  manifest.json        every other file with its size and SHA-256
  config.json          model settings, fields, schema, history length, training step, evaluation
  model.safetensors    dense weights by global name, tables as `table/<name>`, each [num_ids, table_width]
  items.parquet        the catalog: id, raw value, train count, item-side ids
  vocab/<field>.parquet raw value <-> id of the other fields
```

The vocabulary of users stays behind: a bundle knows no user.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarec.base.config import build, plain
from megarec.base.errors import UserError
from megarec.base.files import new_directory, read_json, sha256_of, write_json
from megarec.checkpoint.save import errno_of
from megarec.data.dataset import Dataset, FieldInfo
from megarec.data.schema import Schema
from megarec.models.choice import ModelConfig
from megarec.models.shape import input_shape

FORMAT = "megarec-bundle-1"
TABLE_PREFIX = "table/"
_FILE_NAME = re.compile(r"config\.json|model\.safetensors|items\.parquet|vocab/[A-Za-z_][A-Za-z0-9_]{0,63}\.parquet")
_NEEDED = ("config.json", "model.safetensors", "items.parquet")
_COPY_AGAIN = "Copy the bundle again or convert anew"


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """What `config.json` holds.

    Attributes:
        model: the settings of the model.
        schema: how the raw values of events are to be read.
        fields: every field, the item first.
        has_timestamps: whether events have times.
        max_history_events: the newest events that the model reads.
        step: training steps behind the weights.
        evaluation: the numbers the weights earned, by metric.
        split: the split those numbers belong to.
    """

    model: ModelConfig
    schema: Schema
    fields: dict[str, FieldInfo]
    has_timestamps: bool
    max_history_events: int
    step: int = 0
    evaluation: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_history_events < 1:
            raise UserError("must be at least 1", where="max_history_events")

    def table_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and width of every table the model looks up."""
        tables = input_shape(self.fields, self.model).tables
        return {name: (num_rows, self.model.table_width) for name, num_rows in tables.items()}


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened, verified bundle.

    Attributes:
        path: the directory.
        config: what `config.json` holds.
        dense: dense weights by global name.
        tables: `[num_ids, table_width]` by field.
        catalog: reads `items.parquet`; a dataset without shards.
    """

    path: Path
    config: BundleConfig
    dense: dict[str, Tensor]
    tables: dict[str, Tensor]
    catalog: Dataset


def write_bundle(
    path: Path, config: BundleConfig, *, dense: Mapping[str, Tensor], tables: Mapping[str, Tensor], dataset: Dataset
) -> None:
    """Writes a bundle, whole or not at all.

    Args:
        path: the new directory.
        config: goes to `config.json`.
        dense: dense weights by global name.
        tables: every table the model looks up.
        dataset: where the catalog and the vocabularies are copied from.

    Raises:
        UserError: `path` is taken, the tables are not those of the model, or the dataset lacks a file.
    """
    _check_tables(config, {name: tuple(table.shape) for name, table in tables.items()}, where=str(path))
    tensors = {**dense, **{TABLE_PREFIX + name: table for name, table in tables.items()}}
    with new_directory(path) as staging:
        write_json(staging / "config.json", plain(config))
        try:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, staging / "model.safetensors")
        except SafetensorError as error:
            raise OSError(*errno_of(error)) from None
        (staging / "vocab").mkdir()
        for name in ("items.parquet", *(f"vocab/{f}.parquet" for f in _vocabularies(config))):
            if not (dataset.path / name).is_file():
                raise UserError("the dataset lacks this file", where=str(dataset.path / name), fix="Copy it again")
            shutil.copyfile(dataset.path / name, staging / name)
        files = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file())
        entries = {n: {"bytes": (staging / n).stat().st_size, "sha256": sha256_of(staging / n)} for n in files}
        write_json(staging / "manifest.json", {"format": FORMAT, "files": entries})


def open_bundle(path: Path) -> Bundle:
    """Reads and verifies a bundle: every checksum, every shape.

    Raises:
        UserError: something is missing, damaged, of another format or does not fit together.
    """
    _verify_files(path)
    raw = read_json(path / "config.json", what="bundle configuration")
    if not isinstance(raw, dict):
        raise UserError("not a mapping of settings", where=str(path / "config.json"), fix=_COPY_AGAIN)
    try:
        config = build(BundleConfig, raw)
        catalog = Dataset(
            path=path,
            schema=config.schema,
            fields=config.fields,
            split=config.split,
            counts={},
            shards=[],
            has_timestamps=config.has_timestamps,
        )
    except UserError as error:
        raise UserError(str(error), where=str(path / "config.json")) from None
    file = path / "model.safetensors"
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"not a safetensors file ({error})", where=str(file), fix=_COPY_AGAIN) from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"'{name}' holds {tensor.dtype}, not weights", where=str(file), fix=_COPY_AGAIN)
    tables = {n.removeprefix(TABLE_PREFIX): tensors.pop(n) for n in list(tensors) if n.startswith(TABLE_PREFIX)}
    _check_tables(config, {name: tuple(table.shape) for name, table in tables.items()}, where=str(file))
    catalog.item_counts()  # reads items.parquet, and refuses one of another catalog
    return Bundle(path=path, config=config, dense=tensors, tables=tables, catalog=catalog)


def is_bundle(path: Path) -> bool:
    """Whether `path` looks like a bundle, and not like a checkpoint."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()


def _vocabularies(config: BundleConfig) -> list[str]:
    """The fields that need a vocabulary to be read: the item has its own file."""
    return [f.name for f in config.fields.values() if f.kind in ("id", "categorical") and f.role != "item"]


def _verify_files(path: Path) -> None:
    manifest = read_json(path / "manifest.json", what="bundle")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"not of the format {FORMAT}", where=str(path), fix="Convert again with this version")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not set(_NEEDED) <= set(entries):
        raise UserError("does not list a bundle's files", where=str(path / "manifest.json"), fix=_COPY_AGAIN)
    for name, entry in entries.items():
        file = path / name
        if not _FILE_NAME.fullmatch(name) or not isinstance(entry, dict):  # nothing outside the directory
            raise UserError(f"'{name[:80]}' is no file of a bundle", where=str(path / "manifest.json"))
        if not file.is_file():
            raise UserError("the bundle lacks this file", where=str(file), fix=_COPY_AGAIN)
        if file.stat().st_size != entry.get("bytes") or sha256_of(file) != entry.get("sha256"):
            raise UserError("the file is damaged: its checksum is wrong", where=str(file), fix=_COPY_AGAIN)


def _check_tables(config: BundleConfig, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    expected = config.table_shapes()
    for name in sorted(set(expected) | set(shapes)):
        if expected.get(name) != shapes.get(name):
            raise UserError(
                f"table '{name}' has shape {shapes.get(name)}, the configuration wants {expected.get(name)}",
                where=where,
                fix="The weights and the configuration are not of one run",
            )
