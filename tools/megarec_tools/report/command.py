"""Makes one self-contained HTML file of one or more runs: curves, throughput, metrics, configurations.

megarec-report runs=[outputs/a,outputs/b] output=report.html
"""

from dataclasses import dataclass

from megarec.base.errors import UserError
from megarec.cli.command import run


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report.

    Attributes:
        runs: run directories.
        output: the HTML file; one that exists is replaced.
        title: its heading.
    """

    runs: tuple[str, ...]
    output: str = "report.html"
    title: str = "Training report"

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run is named", where="runs", fix="Give runs=[DIR,DIR]")


def main() -> None:
    """Runs `megarec-report`."""
    run("megarec-report", ReportConfig, _work, about=__doc__)


def _work(config: ReportConfig) -> None:
    from megarec_tools.report.page import write_report

    write_report(config)


if __name__ == "__main__":
    main()
