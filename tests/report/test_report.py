"""One file that needs nothing else, says what the runs say, and runs nothing that they say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from megarec_tools.report.charts import MAX_POINTS, draw_lines, thin
from megarec_tools.report.command import ReportConfig
from megarec_tools.report.page import render, write_report
from megarec_tools.report.runs import differing_settings, read_runs

from megarec.base.errors import UserError

EVIL = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>'


def write_run(path: Path, *, lr: float = 0.1, head: str = "next_item", note: str = "fine") -> Path:
    path.mkdir(parents=True)
    config = {"optimizer": {"lr": lr}, "model": {"name": "argus"}, "note": note}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": step, "seconds": 2.0, "losses": {head: 5.0 / step}, "tokens_per_second": 1e3 * step, "data_wait": 0.01,
         "mfu": 0.4, "learning_rate": lr, "grad_norm": 1.0, "memory_bytes": 2**30}
        for step in range(10, 60, 10)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [{"step": step, "metrics": {"ndcg@10": step / 100}} for step in (20, 40)]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return path


def write_results(path: Path, *, name: str = "argus") -> None:
    ranking = {
        "ndcg@10": {"value": 0.25, "standard_error": 0.0125, "count": 9},
        "mrr": {"value": 0.2, "standard_error": None},
    }
    row = {
        "name": name, "ranking": ranking, "flat": {"ndcg@10": 0.25, "mrr": 0.2, "coverage@10": 0.5},
        "counts": {"users": 9, "targets": 9}, "split": {"rule": "leave_last_out"}, "protocol": {"filter_seen": "none"},
        "feedback": {"listened": {"auc": 0.75, "count": 9.0}},
    }  # fmt: skip
    (path / "evaluation.json").write_text(json.dumps({"rows": [row, {"name": "item rate", "feedback": {}}]}))


class Tags(HTMLParser):
    """Collects tags, their attributes and the text; a start tag without its end is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> Tags:
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_everything_is_there_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=0.2)
    write_results(first)
    write_report(ReportConfig(runs=(str(first), str(second)), output=str(tmp_path / "out" / "report.html")))
    html = (tmp_path / "out" / "report.html").read_text()
    tags = parse(html)
    text = " ".join(tags.text)
    for words in (
        "Loss of next_item",
        "Tokens per second",
        "ndcg@10",
        "0.2500 ± 0.0125",
        "0.7500",
        "optimizer.lr",
        "0.2",
    ):
        assert words in text
    assert [t for t, _ in tags.seen].count("svg") == 1 + 1 + 6
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    ids = [attributes["id"] for _, attributes in tags.seen if attributes.get("id") in used]
    assert len(ids) == len(set(ids)), "two charts share an id, so one would be clipped by the other"
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "iframe", "object", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or (value or "").startswith("#")
    assert "@import" not in html and "url(http" not in html
    assert "prefers-color-scheme: dark" in html and "currentColor" in html


def test_what_runs_say_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a & <b>", head=EVIL + "$x^{", note=EVIL)
    write_results(run, name=EVIL)
    html = render(read_runs([str(run)]), title=EVIL)
    tags = parse(html)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in tags.seen)
    assert sum('alert("x")' in text for text in tags.text) >= 4
    assert "a & <b>" in tags.text


def test_settings_that_differ(tmp_path: Path) -> None:
    runs = read_runs([str(write_run(tmp_path / "a")), str(write_run(tmp_path / "b", lr=0.2))])
    assert differing_settings(runs) == [("optimizer.lr", ["0.1", "0.2"])]
    assert differing_settings(runs[:1] * 2) == []
    assert "the runs have the same settings" in render([runs[0], runs[0]], title="t")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / "x" / "run")), str(write_run(tmp_path / "y" / "run"))]
    assert [run.name for run in read_runs(paths)] == paths
    with pytest.raises(UserError, match="named twice"):
        read_runs([paths[0], paths[0] + "/"])


def test_a_line_cut_by_a_kill_is_dropped_and_numbers_that_are_none_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "losses": {"next_item": NaN}, "tokens_per_second": null}\n{"step": 7')
    (read,) = read_runs([str(run)])
    assert [record["step"] for record in read.metrics] == [10, 20, 30, 40, 50, 60]
    parse(render([read], title="t"))


FAULTS: dict[str, tuple[Any, str]] = {
    "config.yaml": (None, "not a run directory"),
    "metrics.jsonl": ('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2: not a record"),
    "evaluation.json": ("[]", "not an evaluation"),
}


@pytest.mark.parametrize("file", FAULTS)
def test_broken_runs_are_refused(tmp_path: Path, file: str) -> None:
    run = write_run(tmp_path / "a")
    content, message = FAULTS[file]
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_runs([str(run)])


def test_other_broken_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="logged nothing"):
        read_runs([str(run)])
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid yaml"):
        read_runs([str(run)])
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not valid yaml"):
        read_runs([str(run)])
    with pytest.raises(UserError, match="no run is named"):
        ReportConfig(runs=())


def test_long_curves_are_thinned_to_means() -> None:
    steps = [float(i) for i in range(MAX_POINTS * 10)]
    thinned, values = thin((steps, [step * 2 for step in steps]))
    assert len(thinned) == MAX_POINTS
    assert thinned[0] == 4.5 and values[0] == 9.0
    assert thin(([1.0], [2.0])) == ([1.0], [2.0])


def test_a_chart_is_the_same_twice() -> None:
    line = ([1.0, 2.0], [3.0, 4.0])
    assert draw_lines([line, None], name="a") == draw_lines([line, None], name="a")
