"""Seeds of one experiment are one group, and its curve is their mean; anything else keeps runs apart."""

from dataclasses import replace
from pathlib import Path

import pytest
from megarec_tools.report.groups import differing_settings, group_runs, join_curves, spread
from megarec_tools.report.runs import read_runs

from tests.report.report_runs import PROTOCOL, write_run


def groups_of(*runs: Path) -> list[tuple[str, list[str]]]:
    groups = group_runs(read_runs([str(run) for run in runs]))
    return [(group.name, [run.name for run in group.runs]) for group in groups]


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"hstu-seed{seed}", seed=seed) for seed in (0, 1, 2)]
    other = write_run(tmp_path / "other", lr=0.2, seed=7)
    assert groups_of(runs[0], other, *runs[1:]) == [
        ("hstu", ["hstu-seed0", "hstu-seed1", "hstu-seed2"]),
        ("other", ["other"]),
    ]


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"protocol": replace(PROTOCOL, split="valid")}])
def test_any_other_setting_keeps_runs_apart(tmp_path: Path, change: dict[str, object]) -> None:
    runs = [write_run(tmp_path / "a", seed=0), write_run(tmp_path / "b", seed=1, **change)]  # type: ignore[arg-type]
    assert [name for name, _ in groups_of(*runs)] == ["a", "b"]


def test_one_seed_twice_is_no_new_draw(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert groups_of(*runs) == [("a", ["a", "c"]), ("b", ["b"])]


def test_groups_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{n}", seed=n, lr=0.1 if n < 2 else 0.2) for n in range(4)]
    assert [name for name, _ in groups_of(*runs)] == ["run-0", "run-2"]
    numbers = [write_run(tmp_path / "x" / f"{n}", seed=n) for n in range(2)]
    assert [name for name, _ in groups_of(*numbers)] == ["0"]


def test_a_copy_of_the_dataset_is_the_same_dataset(tmp_path: Path) -> None:
    for name, content in (("one", "{}"), ("copy", "{}"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset.json").write_text(content)
    runs = [
        write_run(tmp_path / f"run{n}", seed=n, settings={"data": str(tmp_path / name)})
        for n, name in enumerate(("one", "copy", "other"))
    ]
    assert groups_of(*runs) == [("run", ["run0", "run1"]), ("run2", ["run2"])]
    (different,) = differing_settings(group_runs(read_runs([str(run) for run in runs])))
    assert different[0] == "data" and all(value.startswith("dataset ") for value in different[1])


def test_settings_that_differ(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=0.2, settings={"note": None}, seed=3)]
    groups = group_runs(read_runs([str(run) for run in runs]))
    assert differing_settings(groups) == [("optimizer.lr", ["0.1", "0.2"]), ("note", ["-", ""])]
    assert differing_settings(groups[:1] * 2) == []


def test_mean_and_sample_deviation() -> None:
    three = spread([1.0, 2.0, 6.0])
    assert (three.mean, three.count) == (3.0, 3)
    assert three.deviation == pytest.approx(7.0**0.5, rel=1e-15)  # (4 + 1 + 9) / 2
    assert spread([2.0]).deviation is None


def test_the_curve_of_a_group_is_the_mean_with_the_range(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{seed}", seed=seed, loss=loss) for seed, loss in ((0, 3.0), (1, 6.0), (2, 12.0))]
    lines = (runs[2] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[2] / "metrics.jsonl").write_text("".join(lines[:3]))  # it was killed: the mean ends where it ends
    (group,) = group_runs(read_runs([str(run) for run in runs]))
    line = join_curves(group, lambda run: run.series("losses/next_item"), axis="step")
    assert line is not None
    assert line.x == [10.0, 20.0, 30.0]
    assert line.y == pytest.approx([0.7, 0.35, 7 / 30])
    assert line.low == pytest.approx([0.3, 0.15, 0.1]) and line.high == pytest.approx([1.2, 0.6, 0.4])
    hours = join_curves(group, lambda run: run.series("losses/next_item"), axis="hours")
    assert hours is not None and hours.x == pytest.approx([0.01, 0.02, 0.03])  # 36 seconds each
    assert join_curves(group, lambda run: run.series("nothing"), axis="step") is None


def test_an_evaluation_between_two_log_lines_lies_at_the_earlier(tmp_path: Path) -> None:
    (run,) = read_runs([str(write_run(tmp_path / "a"))])
    assert run.places([10.0, 25.0, 50.0], "hours") == pytest.approx([0.01, 0.02, 0.05])
    assert run.places([10.0, 25.0, 50.0], "epoch") == [0.5, 1.0, 2.5]
    assert run.places([5.0, 25.0], "hours") == []  # before the first line nothing is known
    assert run.places([5.0, 25.0], "step") == [5.0, 25.0]
