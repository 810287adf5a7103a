"""Writes a synthetic music event log as Parquet, in Yambda's flat schema, with the truth about each user's last listen.

The same settings give the same bytes. Events are in events-*.parquet in time order, the true probabilities of
each user's last listen in oracle.parquet, settings, counts and checksums in log.json. docs/synthetic_log.md
describes the process.
"""

from megarec.cli.command import run
from megarec_tools.make_log.config import MakeLogConfig


def main() -> None:
    """Runs `megarec-make-log`."""
    run("megarec-make-log", MakeLogConfig, _work, about=__doc__)


def _work(config: MakeLogConfig) -> None:
    from megarec_tools.make_log.generator import make_log

    make_log(config)


if __name__ == "__main__":
    main()
