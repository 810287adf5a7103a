"""Writes a synthetic music event log as Parquet, in Yambda's flat schema, with the truth about each user's last listen.

The same settings give the same bytes. Events are in events-*.parquet in time order, the true probabilities of
each user's last listen in oracle.parquet, settings, counts and checksums in log.json. docs/synthetic_log.md
describes the process.
"""

from megarec.base.config import build
from megarec.base.errors import run_command
from megarec_tools.make_log.config import MakeLogConfig


def main() -> None:
    """The command `megarec-make-log`."""

    def body() -> None:
        from megarec.cli.command import read_command_line

        settings = read_command_line("megarec-make-log", MakeLogConfig, about=str(__doc__))
        config = build(MakeLogConfig, settings)
        from megarec_tools.make_log.generator import make_log

        make_log(config)

    run_command(body)


if __name__ == "__main__":
    main()
