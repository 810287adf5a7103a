"""The parity gate lets equal answers through and leaves nothing behind otherwise; the commands work on files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megarec_tools.convert import conversion
from megarec_tools.convert.command import ConvertConfig
from megarec_tools.convert.conversion import convert

from megarec.base.errors import UserError
from megarec.cli import evaluate as evaluate_command
from megarec.cli.command import read_command_line
from megarec.cli.evaluate import EvaluateConfig, Trained, measure
from megarec.data.dataset import Dataset
from megarec.metrics.protocol import PROTOCOLS
from tests.inference.synthetic import CONFIGS, MAX_EVENTS, random_weights, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_world(tmp_path_factory.mktemp("world") / "data", num_users=40)


def trained_on(world: Dataset, name: str = "argus") -> Trained:
    weights = random_weights(CONFIGS[name], dtype=torch.float32)
    return Trained(
        model=CONFIGS[name],
        dense=weights.dense,
        tables=weights.tables,
        step=3,
        max_history_events=MAX_EVENTS,
        is_checkpoint=True,
        data=str(world.path),
    )


def use(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> None:
    """`checkpoint` opens as `trained`; bundles open as they do."""
    opened = evaluate_command.open_trained
    monkeypatch.setattr(conversion, "open_trained", lambda p: trained if p.name == "checkpoint" else opened(p))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bundle_answers_as_its_checkpoint(
    name: str, world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, trained_on(world, name))
    convert(ConvertConfig(checkpoint="checkpoint", output=str(tmp_path / "bundle"), tolerance=0.0))
    assert "largest difference to the checkpoint on 38 users: 0.00e+00" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    opened = evaluate_command.open_trained(tmp_path / "bundle")
    assert opened.step == 3 and not opened.is_checkpoint
    with pytest.raises(UserError, match="a bundle already"):
        convert(ConvertConfig(checkpoint=str(tmp_path / "bundle"), output=str(tmp_path / "again")))


def test_a_bundle_that_differs_is_not_left_behind(
    world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: one weight changes on its way into the bundle."""
    use(monkeypatch, trained_on(world))
    written = conversion.write_bundle

    def spoil(path: Path, config: object, *, dense: dict[str, torch.Tensor], **rest: object) -> None:
        name = next(n for n in dense if n.endswith("weight"))
        written(path, config, dense={**dense, name: dense[name] * 1.01}, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion, "write_bundle", spoil)
    with pytest.raises(UserError, match="bundle and checkpoint differ by"):
        convert(ConvertConfig(checkpoint="checkpoint", output=str(tmp_path / "bundle")))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_do_not_pass(
    world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = trained_on(world)
    name = next(iter(broken.dense))
    use(monkeypatch, replace(broken, dense={**broken.dense, name: torch.full_like(broken.dense[name], torch.nan)}))
    with pytest.raises(UserError, match="differ by nan"):
        convert(ConvertConfig(checkpoint="checkpoint", output=str(tmp_path / "bundle")))
    assert list(tmp_path.iterdir()) == []


def test_evaluate_prints_and_writes(
    world: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, trained_on(world))
    convert(ConvertConfig(checkpoint="checkpoint", output=str(tmp_path / "bundle")))
    capsys.readouterr()
    config = EvaluateConfig(model=str(tmp_path / "bundle"), data=str(world.path), output=str(tmp_path / "out"))
    measure(config)
    printed = capsys.readouterr().out
    rows = ["bundle", "MostPop", "DecayPop", "Markov", "ItemKNN"]
    for name in (*rows, "item rate", "user rate", "better rate", "feedback 'listened'", "newest 12 events"):
        assert name in printed
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert [row["name"] for row in written["rows"]] == [*rows, "item rate", "user rate"]
    assert written["rows"][0]["protocol"]["max_history_events"] == MAX_EVENTS
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="does not say which dataset"):
        measure(replace(config, data=None))
    with pytest.raises(UserError, match="nothing to measure"):
        EvaluateConfig(baselines=False, data="x")


def test_model_is_a_key_and_not_a_group_of_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["megarec-evaluate", "model=outputs/run", "protocol.filter_seen=full", "protocol=yambda"]
    )
    settings = read_command_line("megarec-evaluate", EvaluateConfig, about="", ready={"protocol": PROTOCOLS})
    assert settings["model"] == "outputs/run" and settings["protocol"]["filter_seen"] == "full"
    assert settings["protocol"]["catalog"] == "trained"
