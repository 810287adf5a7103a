"""A bundle opens as it was written, and nothing damaged, foreign or hostile opens at all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarec.base.errors import UserError
from megarec.base.files import sha256_of
from megarec.data.dataset import Dataset
from megarec.inference.bundle import BundleConfig, is_bundle, open_bundle, write_bundle
from tests.inference.synthetic import CONFIGS, FIELDS, MAX_EVENTS, SCHEMA, random_weights, write_world

CONFIG = BundleConfig(
    model=CONFIGS["argus"],
    schema=SCHEMA,
    fields=FIELDS,
    has_timestamps=True,
    max_history_events=MAX_EVENTS,
    step=7,
    evaluation={"ndcg@10": 0.5},
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data")


@pytest.fixture
def bundle(world: Dataset, tmp_path: Path) -> Path:
    weights = random_weights(CONFIG.model, dtype=torch.float32)
    write_bundle(tmp_path / "bundle", CONFIG, dense=weights.dense, tables=weights.tables, dataset=world)
    return tmp_path / "bundle"


def test_opens_as_it_was_written(bundle: Path, world: Dataset) -> None:
    opened, weights = open_bundle(bundle), random_weights(CONFIG.model, dtype=torch.float32)
    assert opened.config == CONFIG
    assert is_bundle(bundle) and not is_bundle(world.path)
    for held, given in ((opened.dense, weights.dense), (opened.tables, weights.tables)):
        assert held.keys() == given.keys()
        assert all(torch.equal(held[name], given[name]) for name in given)
    assert opened.catalog.item_raw() == world.item_raw()
    assert not (bundle / "vocab" / "user.parquet").exists()
    assert sorted(p.name for p in (bundle / "vocab").iterdir()) == ["artist.parquet", "device.parquet", "tags.parquet"]


def test_the_same_bundle_has_the_same_bytes(bundle: Path, world: Dataset, tmp_path: Path) -> None:
    weights = random_weights(CONFIG.model, dtype=torch.float32)
    write_bundle(tmp_path / "again", CONFIG, dense=weights.dense, tables=weights.tables, dataset=world)
    for file in (f for f in bundle.rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(bundle)).read_bytes()


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def reseal(bundle: Path, name: str) -> None:
    """Makes the manifest agree with a changed file: what remains is the file's own fault."""
    entry = {"bytes": (bundle / name).stat().st_size, "sha256": sha256_of(bundle / name)}
    edit_json(bundle / "manifest.json", lambda m: m["files"].update({name: entry}))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "no bundle here"),
    "no config": (lambda b: (b / "config.json").unlink(), "lacks this file"),
    "no vocabulary": (lambda b: (b / "vocab" / "device.parquet").unlink(), "lacks this file"),
    "cut weights": (lambda b: (b / "model.safetensors").write_bytes(b"\x00" * 9), "checksum is wrong"),
    "one flipped bit": (lambda b: flip(b / "model.safetensors"), "checksum is wrong"),
    "foreign format": (lambda b: edit_json(b / "manifest.json", lambda m: m.update(format="x")), "not of the format"),
    "no list": (lambda b: edit_json(b / "manifest.json", lambda m: m.update(files=[])), "does not list"),
    "a path outside": (
        lambda b: edit_json(b / "manifest.json", lambda m: m["files"].update({"../../etc/passwd": {}})),
        "no file of a bundle",
    ),
    "a pickle": (
        lambda b: edit_json(b / "manifest.json", lambda m: m["files"].update({"model.pt": {}})),
        "no file of a bundle",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_found(bundle: Path, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(bundle)
    with pytest.raises(UserError, match=message):
        open_bundle(bundle)


def test_sealed_nonsense_is_found(bundle: Path, tmp_path: Path) -> None:
    def copy() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(bundle, tmp_path / "copy"))

    other = copy()
    (other / "model.safetensors").write_bytes(b"not tensors at all")
    reseal(other, "model.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        open_bundle(other)
    other = copy()
    edit_json(other / "config.json", lambda c: c["model"].update(widht=3))
    reseal(other, "config.json")
    with pytest.raises(UserError, match="Did you mean 'width'"):
        open_bundle(other)
    other = copy()
    edit_json(other / "config.json", lambda c: c["fields"]["device"].update(num_ids=9))
    reseal(other, "config.json")
    with pytest.raises(UserError, match="table 'device' has shape"):
        open_bundle(other)
    other = copy()
    save_file({"table/unknown": torch.zeros(2, 2)}, other / "model.safetensors")
    reseal(other, "model.safetensors")
    with pytest.raises(UserError, match="table 'artist' has shape None"):
        open_bundle(other)
    other = copy()
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "table/item": weights["table/item"].to(torch.int8)}, other / "model.safetensors")
    reseal(other, "model.safetensors")
    with pytest.raises(UserError, match=r"'table/item' holds torch\.int8, not weights"):
        open_bundle(other)


def test_writing_refuses_what_does_not_fit_and_leaves_nothing(world: Dataset, tmp_path: Path) -> None:
    weights = random_weights(CONFIG.model)
    path = tmp_path / "bundle"
    with pytest.raises(UserError, match="table 'item' has shape"):
        write_bundle(
            path, CONFIG, dense=weights.dense, tables={**weights.tables, "item": torch.zeros(3, 8)}, dataset=world
        )
    with pytest.raises(UserError, match="lacks this file"):
        lost = replace(world, path=tmp_path / "nowhere")
        write_bundle(path, CONFIG, dense=weights.dense, tables=weights.tables, dataset=lost)
    assert list(tmp_path.iterdir()) == []
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        write_bundle(path, CONFIG, dense=weights.dense, tables=weights.tables, dataset=world)
