"""Tables of results: exact means and noise, rules that keep tables apart, and what the choice of a step was worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megarec_tools.report.command import ReportConfig
from megarec_tools.report.content import read_content
from megarec_tools.report.references import read_references
from megarec_tools.report.tables import Table

from megarec.base.errors import UserError
from megarec.metrics.protocol import PROTOCOLS, Protocol
from tests.report.report_runs import PROTOCOL, result_row, write_evaluation, write_run

VALID = replace(PROTOCOL, split="valid")


def results_of(*runs: Path, evaluations: tuple[Path, ...] = (), **settings: Any) -> list[Table]:
    config = ReportConfig(runs=tuple(map(str, runs)), evaluations=tuple(map(str, evaluations)), **settings)
    return list(read_content(config).results)


def rows_of(table: Table, column: str = "ndcg@10") -> list[tuple[str, str, str, str]]:
    place = list(table.header).index(column)
    return [(row[0], row[1], row[2], row[place].replace("\n", " ")) for row in table.rows]


def test_mean_error_and_deviation_over_seeds(tmp_path: Path) -> None:
    curves = ({20: 0.1, 40: 0.2, 50: 0.16}, {20: 0.1, 40: 0.2, 50: 0.24}, {20: 0.3, 40: 0.2, 50: 0.11})
    runs = [write_run(tmp_path / f"s{n}", seed=n, ndcg=curve) for n, curve in enumerate(curves)]
    (table,) = results_of(*runs)
    # last: .16, .24, .11; best: .2 at 40, .24 at 50, .3 at 20; the error is a tenth of the value everywhere
    assert rows_of(table) == [
        ("s0", "last: 50", "3", "0.1700 ± 0.0170 (sd 0.0656)"),
        ("s0", "best: 20 to 50", "3", "0.2467 ± 0.0247 (sd 0.0503)"),
    ]
    assert "selection on test" in table.warning and "ndcg@10" in table.warning


def test_the_first_of_equal_steps_is_the_best_and_keep_best_names_the_metric(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ndcg={20: 0.3, 40: 0.3, 50: 0.1})
    assert [row[1] for row in rows_of(results_of(run)[0])] == ["last: 50", "best: 20"]
    records = [
        {"step": step, "metrics": {"ndcg@10": -step / 100, "mrr": step / 100}, "protocol": "p"} for step in (20, 40, 30)
    ]
    other = write_run(tmp_path / "b", settings={"checkpoint": {"keep_best": "mrr"}})
    (other / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (table,) = results_of(other)
    assert [row[1] for row in rows_of(table)] == ["last: 30", "best: 40"] and "chosen by mrr" in table.warning


def test_best_is_last_needs_one_row_and_no_warning(tmp_path: Path) -> None:
    (table,) = results_of(write_run(tmp_path / "a", ndcg={20: 0.1, 50: 0.2}))
    assert rows_of(table) == [("a", "last and best: 50", "1", "0.2000 ± 0.0200")]
    assert table.warning == ""


def test_a_step_chosen_on_valid_is_reported_on_eval_without_reproach(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ndcg={20: 0.3, 40: 0.4, 50: 0.2}, protocol=VALID)
    checkpoint = run / "checkpoints" / "step-00000040"
    write_evaluation(tmp_path / "final", [result_row("a", 0.25, run=str(checkpoint), step=40, seed=0)])
    valid, final = results_of(run, evaluations=(tmp_path / "final",))
    assert "split valid" in valid.title and "chosen by ndcg@10 on the split valid" in valid.warning
    assert "selection on test" not in valid.warning
    assert "split eval" in final.title
    assert rows_of(final) == [("a", "best: 40", "1", "0.2500 ± 0.0250")]
    assert final.warning == "The best step was chosen on the split valid, without a look at eval."


def test_baselines_stand_once_and_training_is_joined_with_the_evaluation_by_hand(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{n}", seed=n, ndcg={20: 0.1, 50: 0.2 + n / 10}) for n in (0, 1)]
    for n, run in enumerate(runs):
        rows = [result_row("s", 0.2 + n / 10, run=str(run), step=50), result_row("MostPop", 0.0625)]
        write_evaluation(run, rows)
    (table,) = results_of(*runs)
    assert list(table.header) == ["", "step", "seeds", "hr@10", "ndcg@10"]  # those the protocol names
    assert rows_of(table) == [
        ("s0", "last and best: 50", "2", "0.2500 ± 0.0250 (sd 0.0707)"),
        ("MostPop", "", "", "0.0625 ± 0.0063"),
    ]
    assert "9 users" in " ".join(table.notes)


def test_baselines_of_one_name_with_other_numbers_both_stand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    write_evaluation(tmp_path / "x", [result_row("MostPop", 0.0625)])
    write_evaluation(tmp_path / "y", [result_row("MostPop", 0.125)])
    (table,) = results_of(run, evaluations=(tmp_path / "x", tmp_path / "y"))
    assert [row[0] for row in table.rows] == ["a", "MostPop [1]", "MostPop [2]"]
    assert "another dataset" in " ".join(table.notes)


def test_a_seed_that_was_not_measured_is_counted(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"s{n}", seed=n, ndcg={} if n else {50: 0.2}) for n in (0, 1)]
    (table,) = results_of(*runs)
    assert rows_of(table) == [("s0", "last and best: 50", "1 of 2", "0.2000 ± 0.0200")]


def test_other_steps_are_shown_when_they_were_measured_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ndcg={20: 0.3, 30: 0.1, 50: 0.2})
    write_evaluation(tmp_path / "x", [result_row("a", 0.1, run=str(run), step=30)])
    (table,) = results_of(run, evaluations=(tmp_path / "x",))
    assert [row[1] for row in rows_of(table)] == ["last: 50", "best: 20", "30"]


RULES: dict[str, tuple[dict[str, Any], Protocol]] = {
    "another split": ({}, VALID),
    "a changed field": ({}, replace(PROTOCOL, filter_seen="full")),
    "another dataset": ({"data": "elsewhere"}, PROTOCOL),
    "fewer users": ({"max_users": 5}, PROTOCOL),
    "another protocol": ({}, PROTOCOLS["full_filter"]),
    "another window": ({}, replace(PROTOCOL, max_history_events=50)),
}


@pytest.mark.parametrize("fault", RULES)
def test_different_rules_never_share_a_table(tmp_path: Path, fault: str) -> None:
    facts, protocol = RULES[fault]
    run = write_run(tmp_path / "a", ndcg={50: 0.2})
    write_evaluation(tmp_path / "x", [result_row("MostPop", 0.0625)])
    write_evaluation(tmp_path / "y", [result_row("MostPop", 0.125, protocol=protocol)], protocol=protocol, **facts)
    tables = results_of(run, evaluations=(tmp_path / "x", tmp_path / "y"))
    assert [[row[0] for row in table.rows] for table in tables] == [["a", "MostPop"], ["MostPop"]]
    assert all("protocol" in table.title and "split" in table.title for table in tables)
    assert len({(table.title, *table.notes) for table in tables}) == 2
    assert ("elsewhere" in tables[1].title) == (fault == "another dataset")


def test_a_periodic_evaluation_says_its_window(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ndcg={50: 0.2})
    records = run / "evaluations.jsonl"
    records.write_text(records.read_text().replace('"protocol"', '"max_history_events": 24, "protocol"'))
    write_evaluation(tmp_path / "x", [result_row("MostPop", 0.0625, protocol=replace(PROTOCOL, max_history_events=24))])
    (table,) = results_of(run, evaluations=(tmp_path / "x",))
    assert [row[0] for row in table.rows] == ["a", "MostPop"]


def test_other_metrics_are_no_other_rules(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ndcg={50: 0.2}, protocol=PROTOCOLS["hstu_public"])
    write_evaluation(tmp_path / "x", [result_row("MostPop", 0.0625)])
    assert len(results_of(run, evaluations=(tmp_path / "x",))) == 1


def test_runs_under_different_protocols_share_no_chart(tmp_path: Path) -> None:
    full = replace(PROTOCOL, filter_seen="full")
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=0.2, protocol=full)]
    content = read_content(ReportConfig(runs=tuple(map(str, runs))))
    assert len(content.results) == 2
    for chart in content.curves["Evaluation during training"]:
        assert sum(line is not None for line in chart.lines) == 1
    assert all(None not in chart.lines for chart in content.curves["Losses"])


def test_a_model_that_is_not_in_the_report_stands_under_its_own_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ndcg={50: 0.2})
    rows = [result_row("a", 0.2, run=str(run), step=50), result_row("bundle", 0.3, run=str(tmp_path / "b"), step=7)]
    write_evaluation(run, rows)
    assert [row[:3] for row in rows_of(results_of(run)[0])] == [("a", "last and best: 50", "1"), ("bundle", "7", "")]
    moved = write_evaluation(run, [result_row("a", 0.2, run="/no/such/place", step=50)])
    assert [row[:3] for row in rows_of(results_of(moved)[0])] == [("a", "last and best: 50", "1")]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    assert list(results_of(run, metrics=("ndcg@10",))[0].header) == ["", "step", "seeds", "ndcg@10"]
    with pytest.raises(UserError, match=r"no metric 'ndcg@11'. Did you mean 'ndcg@10'"):
        results_of(run, metrics=("ndcg@11",))


def test_feedback_has_tables_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    records = [
        {"step": step, "metrics": {"ndcg@10": 0.1, "listened/auc": step / 100}, "protocol": "hstu_public"}
        for step in (20, 50)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rates = {"listened": {"auc": 0.625, "count": 9.0}, "liked": {"auc": 0.5}}  # the run does not predict `liked`
    rate = {"feedback": rates, "flat": {}, "ranking": {}}
    write_evaluation(run, [{**result_row("item rate", 0.1), **rate}])
    ranking, feedback = results_of(run)
    assert list(ranking.header) == ["", "step", "seeds", "ndcg@10"]
    assert rows_of(feedback, "auc") == [
        ("a", "last: 50", "1", "0.5000"),
        ("a", "best: 20", "1", "0.2000"),
        ("item rate", "", "", "0.6250"),
    ]
    assert rows_of(feedback, "count")[-1][-1] == "9"


def test_quoted_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    papers = tmp_path / "papers.yaml"
    papers.write_text("HSTU: {hr@10: 0.3097, mrr: 0.15, source: its README}\n")
    (table,) = results_of(run, references=str(papers))
    assert list(table.header)[3:] == ["hr@10", "ndcg@10", "mrr"]
    assert list(table.rows[-1]) == ["HSTU (quoted)", "", "", "0.3097", "-", "0.1500"]
    assert "Quoted rows were not measured here (its README)" in " ".join(table.notes)
    other = write_run(tmp_path / "b", lr=0.2, protocol=PROTOCOLS["full_filter"])
    with pytest.raises(UserError, match=r"'HSTU' fits 2 tables\. Name its protocol"):
        results_of(run, other, references=str(papers))
    papers.write_text("HSTU: {hr@10: 0.3097, protocol: full_filter}\n")
    first, second = results_of(run, other, references=str(papers))
    assert len(first.rows) == 1 and len(second.rows) == 2
    papers.write_text("HSTU: {hr@10: 0.3097, protocol: hstu_pubic}\n")
    with pytest.raises(UserError, match=r"fits no table\. Did you mean 'hstu_public'"):
        results_of(run, references=str(papers))


FAULTS = {
    "[1, 2]": "not a mapping",
    "HSTU: 3": "not a mapping of metrics",
    "HSTU: {hr@10: 30.97}": r"HSTU\.hr@10: 30\.97 is not a number from 0 to 1",
    "HSTU: {hr@10: high}": "not a number from 0 to 1",
    "HSTU: {hr@10: .nan}": "not a number from 0 to 1",
    "HSTU: {source: x}": "quotes no metric",
    "a: [": "not valid yaml",
    "!!python/object/apply:os.system ['true']": "not valid yaml",
}


@pytest.mark.parametrize("text", FAULTS)
def test_broken_references_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "papers.yaml").write_text(text)
    with pytest.raises(UserError, match=FAULTS[text]):
        read_references(tmp_path / "papers.yaml")
    with pytest.raises(UserError, match="no file of references here"):
        read_references(tmp_path / "other.yaml")
