"""Makes one self-contained HTML file of one or more runs: curves, throughput, metrics, configurations.

megarec-report runs=[outputs/a,outputs/b] output=report.html
"""

from dataclasses import dataclass

from megarec.base.errors import UserError, run_command


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

    def body() -> None:
        from megarec.cli.command import read_command_line

        settings = read_command_line("megarec-report", ReportConfig, about=__doc__ or "")
        from megarec.base.config import build
        from megarec_tools.report.page import write_report

        write_report(build(ReportConfig, settings))

    run_command(body)


if __name__ == "__main__":
    main()
