"""Makes one page of one or more runs: curves, throughput, metrics with their noise, configurations.

Runs that differ only in their seed are one group: curves show the mean and the range, tables the mean and its spread.
The suffix of the output chooses the kind: .html, one file that needs nothing else, or .md with a .png of the curves.

megarec-report runs=[outputs/a,outputs/b] output=report.html
megarec-report runs=[outputs/a,outputs/b] evaluations=[outputs/final] references=papers.yaml output=results.md
"""

from dataclasses import dataclass
from pathlib import Path

from megarec.base.errors import UserError
from megarec.cli.command import run


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report.

    Attributes:
        runs: run directories.
        evaluations: directories into which `megarec-evaluate` wrote, beside those of the runs themselves.
        references: a yaml or JSON file of published numbers, name -> metric -> number; they stand as quoted rows.
        metrics: columns of the tables of results; none: the usual ones, as far as they were measured.
        output: the file, .html or .md; one that exists is replaced.
        title: its heading.
    """

    runs: tuple[str, ...]
    evaluations: tuple[str, ...] = ()
    references: str | None = None
    metrics: tuple[str, ...] = ()
    output: str = "report.html"
    title: str = "Training report"

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run is named", where="runs", fix="Give runs=[DIR,DIR]")
        if Path(self.output).suffix not in (".html", ".md"):
            raise UserError(f"'{self.output}' ends in neither .html nor .md", where="output")


def main() -> None:
    """Runs `megarec-report`."""
    run("megarec-report", ReportConfig, _work, about=__doc__)


def _work(config: ReportConfig) -> None:
    from megarec_tools.report.page import write_report

    write_report(config)


if __name__ == "__main__":
    main()
