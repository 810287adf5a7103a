#!/usr/bin/env bash
# The whole road on a laptop: a log, shards, a model, its evaluation, a bundle, recommendations, a report.
# Usage: run.sh [folder]; what an earlier run left in the folder (default: quickstart) is made anew.
set -euo pipefail
# Two processes of one thread each: small products gain little from threads, and threads stall on cores that others use.
export OMP_NUM_THREADS=1
out=${1:-quickstart}
mkdir -p "$out"
rm -rf "$out"/{log,data,run,bundle,report.html}

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

step megarec-make-log output="$out/log" num_users=12000 num_events=1500000
step megarec-make-shards input="$out/log/events-*.parquet" output="$out/data" schema=yambda
step torchrun --standalone --nproc-per-node 2 -m megarec.cli.train experiment=quickstart data="$out/data" run_dir="$out/run"
step megarec-evaluate model="$out/run" data="$out/data" oracle="$out/log/oracle.parquet" output="$out/run"
step megarec-convert checkpoint="$out/run" data="$out/data" output="$out/bundle"
user=$(python -c "import polars, sys; print(polars.read_parquet(sys.argv[1])['raw'][0])" "$out/data/vocab/user.parquet")
step megarec-recommend bundle="$out/bundle" data="$out/data" user="$user" k=5
step megarec-report runs="[$out/run]" output="$out/report.html"
printf '\nOpen %s/report.html in a browser.\n' "$out"
