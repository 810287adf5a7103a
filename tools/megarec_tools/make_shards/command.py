"""Makes a dataset directory of shards from event logs.

Reads Parquet, CSV, TSV and JSON lines (plain, .gz or .zst): one file, a glob, a directory or a list. The schema says
what the columns mean: a ready one by its name, a yaml file, or schema=infer, which prints what it found and stops
(exit code 2) until approve=true. Bad rows go to rejects.parquet; too many of them stop the command. items= and users=
name the publisher's files about the items and the users, such as movies.csv and users.dat.

  megarec-make-shards input=events.parquet output=my_data schema=yambda
  megarec-make-shards input='logs/*.csv.gz' output=my_data schema=my.yaml split.rule=global_time split.cut=2024-05-01
  megarec-make-shards input=ml-1m/ratings.dat items=ml-1m/movies.dat users=ml-1m/users.dat output=my_data \\
      schema=movielens_1m
"""

from textwrap import wrap

from megarec.cli.command import HELP_WIDTH, run
from megarec.data.schema import ready_schemas
from megarec_tools.make_shards.config import MakeShardsConfig


def main() -> None:
    """Runs `megarec-make-shards`."""
    ready = wrap(f"Ready schemas: {', '.join(ready_schemas())}.", HELP_WIDTH)
    run("megarec-make-shards", MakeShardsConfig, _work, about="\n".join([__doc__ or "", *ready]))


def _work(config: MakeShardsConfig) -> None:
    from megarec_tools.make_shards.pipeline import make_shards

    make_shards(config)


if __name__ == "__main__":
    main()
