"""Makes a dataset directory of shards from event logs.

Reads Parquet, CSV, TSV and JSON lines (plain, .gz or .zst): one file, a glob, a directory or a list. The schema says
what the columns mean: a ready one by its name, a yaml file, or schema=infer, which prints what it found and stops
(exit code 2) until approve=true. Bad rows go to rejects.parquet; too many of them stop the command.

  megarec-make-shards input=events.parquet output=my_data schema=yambda
  megarec-make-shards input='logs/*.csv.gz' output=my_data schema=my.yaml split.rule=global_time split.cut=2024-05-01
"""

from megarec.base.config import build
from megarec.base.errors import run_command
from megarec_tools.make_shards.config import MakeShardsConfig


def main() -> None:
    """The command `megarec-make-shards`."""

    def body() -> None:
        from megarec.cli.command import read_command_line

        settings = read_command_line("megarec-make-shards", MakeShardsConfig, about=__doc__)
        from megarec_tools.make_shards.pipeline import make_shards  # polars and pyarrow, only after `--help`

        make_shards(build(MakeShardsConfig, settings))

    run_command(body)


if __name__ == "__main__":
    main()
