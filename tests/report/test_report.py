"""One file that needs nothing else, says what the runs say, and runs nothing that they say."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from megarec_tools.report.charts import MAX_POINTS, Chart, Line, draw_svg, style_of, thin
from megarec_tools.report.command import ReportConfig
from megarec_tools.report.content import read_content
from megarec_tools.report.page import html, markdown, write_report
from megarec_tools.report.runs import read_runs

from megarec.base.errors import UserError
from tests.report.report_runs import result_row, write_evaluation, write_run

EVIL = '</pre><script>alert("x")</script><img src=x onerror=alert(1)>'


class Tags(HTMLParser):
    """Collects tags, their attributes and the text; a start tag without its end is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def page_of(*runs: Path, **settings: Any) -> str:
    return html(read_content(ReportConfig(runs=tuple(map(str, runs)), **settings)))


def test_everything_is_there_and_nothing_comes_from_outside(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=0.2)
    feedback = {"listened": {"auc": 0.75, "count": 9.0}}
    rows = [result_row("a", 0.25, run=str(first), step=50, feedback=feedback), result_row("MostPop", 0.125)]
    write_evaluation(first, rows)
    write_report(ReportConfig(runs=(str(first), str(second)), output=str(tmp_path / "out" / "report.html")))
    page = (tmp_path / "out" / "report.html").read_text()
    tags = parse(page)
    text = " ".join(tags.text)
    for words in ("Loss of next_item", "Tokens per second", "ndcg@10", "0.2500\n± 0.0250", "MostPop", "0.7500",
                  "optimizer.lr", "0.2", "filter_seen=window"):  # fmt: skip
        assert words in text
    # over steps, epochs and hours: the loss and two metrics; over steps alone: six of speed
    assert [t for t, _ in tags.seen].count("svg") == 3 * (1 + 2) + 6
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    ids = [attributes["id"] for _, attributes in tags.seen if attributes.get("id") in used]
    assert len(ids) == len(set(ids)), "two charts share an id, so one would be clipped by the other"
    for tag, attributes in tags.seen:
        assert tag not in ("script", "link", "iframe", "object", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "href") or (value or "").startswith("#")
    assert "@import" not in page and "url(http" not in page
    assert "prefers-color-scheme: dark" in page and "currentColor" in page


def test_every_picture_is_in_the_view_of_some_axis(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "a"))
    views = re.findall(r'class="view ([^"]+)"', page)
    assert views.count("on-step") == views.count("on-epoch") == views.count("on-hours") == 3
    assert views.count("on-step on-epoch on-hours") == 6  # of speed there is no other picture
    for axis in ("step", "epoch", "hours"):
        assert f'id="by-{axis}"' in page and f"#by-{axis}:checked ~ main .on-{axis}" in page


def test_what_runs_say_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a & <b>", head=EVIL + "$x^{", settings={"note": EVIL})
    write_evaluation(run, [result_row(EVIL, 0.25)], changed=["filter_seen"])
    (tmp_path / "papers.yaml").write_text(json.dumps({EVIL: {"hr@10": 0.5, "protocol": "hstu_public", "source": EVIL}}))
    tags = parse(page_of(run, title=EVIL, references=str(tmp_path / "papers.yaml")))
    assert {"script", "img"}.isdisjoint(tag for tag, _ in tags.seen)
    assert sum('alert("x")' in text for text in tags.text) >= 6
    assert any("a & <b>" in text for text in tags.text)


def test_markdown_has_the_tables_and_a_picture_beside_it(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"hstu-seed{seed}", seed=seed) for seed in (0, 1)]
    write_evaluation(tmp_path / "final", [result_row("Most|Pop_", 0.2)])
    config = ReportConfig(
        runs=tuple(map(str, runs)), evaluations=(str(tmp_path / "final"),), output=str(tmp_path / "results.md")
    )
    write_report(config)
    text = (tmp_path / "results.md").read_text()
    assert "## protocol hstu\\_public" not in text  # an underscore inside a word needs no sign
    assert "\n| Most\\|Pop\\_ |  |  | 0.3000 ± 0.0300 | 0.2000 ± 0.0200 |\n" in text
    assert "| hstu | last and best: 40 | 2 | 0.6000 ± 0.0600 (sd 0.0000) | 0.4000 ± 0.0400 (sd 0.0000) |" in text
    assert "![The curves of the runs over their steps](<results.png>)" in text
    picture = matplotlib.image.imread(tmp_path / "results.png")
    assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "final", "hstu-seed0", "hstu-seed1", "results.md", "results.png"]  # fmt: skip


def test_markdown_is_escaped(tmp_path: Path) -> None:
    name = EVIL.replace("/", "") + "|*[x](javascript:1)`"
    run = write_run(tmp_path / name, head="$x^{")
    text = markdown(read_content(ReportConfig(runs=(str(run),), title=f"a\n# {EVIL}")), picture="x.png")
    assert "\n# <" not in text and re.search(r"(?<!\\)<(?!x\.png>)", text) is None
    assert "\\|\\*\\[x\\](javascript:1)\\`" in text
    write_report(ReportConfig(runs=(str(run),), output=str(tmp_path / "r.md")))  # a `$` starts no mathematics


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / "x" / "run")), str(write_run(tmp_path / "y" / "run"))]
    assert [run.name for run in read_runs(paths)] == paths
    with pytest.raises(UserError, match="named twice"):
        read_runs([paths[0], paths[0] + "/"])


def test_a_line_cut_by_a_kill_is_dropped_and_numbers_that_are_none_do_no_harm(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "losses": {"next_item": NaN}, "tokens_per_second": null}\n{"step": 7')
    (run / "evaluations.jsonl").write_text('{"step": 60, "metrics": {"ndcg@10": null, "hr@10": NaN}}\n{"step": 7')
    (read,) = read_runs([str(run)])
    assert [record["step"] for record in read.metrics] == [10, 20, 30, 40, 50, 60]
    parse(page_of(run))


def test_a_run_without_evaluations_is_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "evaluations.jsonl").unlink()
    text = " ".join(parse(page_of(run)).text)
    assert "Loss of next_item" in text and "Evaluation during training" not in text and "Results" not in text


FAULTS: dict[str, tuple[str | None, str]] = {
    "config.yaml": (None, "not a run directory"),
    "metrics.jsonl": ('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2: not a record"),
    "evaluations.jsonl": ('{"step": NaN, "metrics": {}}\n', "a step is not a number"),
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
    with pytest.raises(UserError, match="no evaluation here"):
        page_of(run, evaluations=(str(tmp_path),))
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
    with pytest.raises(UserError, match=r"neither \.html nor \.md"):
        ReportConfig(runs=("a",), output="report.pdf")


def test_long_curves_are_thinned_to_means() -> None:
    thinned = thin([float(i) for i in range(MAX_POINTS * 10)])
    assert len(thinned) == MAX_POINTS and thinned[0] == 4.5
    assert thin([2.0]) == [2.0]


def test_a_chart_is_the_same_twice_and_has_a_band_for_seeds() -> None:
    line = Line(x=[1.0, 2.0], y=[3.0, 4.0], low=[3.0, 4.0], high=[3.0, 4.0])
    banded = Line(x=[1.0, 2.0], y=[3.0, 4.0], low=[2.0, 4.0], high=[4.0, 4.0])
    chart = Chart(title="a", axis="step", lines=[line, None])
    assert draw_svg(chart) == draw_svg(chart)
    assert "FillBetween" not in draw_svg(chart)
    assert "FillBetween" in draw_svg(Chart(title="a", axis="step", lines=[banded]))


def test_twelve_lines_can_be_told_apart() -> None:
    assert len({style_of(place) for place in range(12)}) == 12
