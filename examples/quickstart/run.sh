#!/usr/bin/env bash
# The whole road on a laptop: a log, shards, a model, its evaluation, a bundle, recommendations, a report.
# Usage: run.sh [folder]; the folder (default: quickstart) is made anew.
set -euo pipefail
out=${1:-quickstart}
rm -rf "$out"
mkdir -p "$out"

step() { printf '\n== %s\n' "$*" >&2; "$@"; }

step megarec-make-log output="$out/log"
step megarec-make-shards input="$out/log/events-*.parquet" output="$out/data" schema=yambda users_per_block=256
step megarec-train experiment=quickstart data="$out/data" run_dir="$out/run"
step megarec-evaluate model="$out/run" data="$out/data" oracle="$out/log/oracle.parquet" output="$out/run"
step megarec-convert checkpoint="$out/run" data="$out/data" output="$out/bundle"
user=$(head -c 0 /dev/null; python - "$out" <<'PY'
import sys
import polars as pl
print(pl.read_parquet(f"{sys.argv[1]}/data/vocab/user.parquet")["raw"][0])
PY
)
step megarec-recommend bundle="$out/bundle" data="$out/data" user="$user" k=10
step megarec-report runs="[$out/run]" output="$out/report.html"
printf '\nOpen %s/report.html in a browser.\n' "$out"
