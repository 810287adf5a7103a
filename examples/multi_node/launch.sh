#!/usr/bin/env bash
# One training job on several hosts: run the same line on every one of them, by hand, by ssh or by a scheduler.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage, on every host: NNODES=2 MASTER_ADDR=host0 [NODE_RANK=0] launch.sh key=value ...   (keys of megarec-train)

  NNODES           number of hosts; 1
  MASTER_ADDR      a host that all others reach: where the ranks meet; must be given when NNODES is above 1
  MASTER_PORT      a free port on it; 29500
  NODE_RANK        0, 1, ... on the hosts: fixed numbers (static rendezvous). Not set: the hosts number themselves (c10d)
  NPROC_PER_NODE   processes per host; the number of its GPUs, or 1
  JOB_ID           what tells this job from another one that meets at the same place; megarec
  MAX_RESTARTS     how often all processes are started again after one fails; 3, and 0 with NODE_RANK
  LOCAL_ADDR       the address of this host that the others reach, where its name does not lead to it; on the host of
                   MASTER_ADDR the same text as there
TEXT
}

case ${1:---help} in
  -h | --help) usage && exit 0 ;;
esac

nnodes=${NNODES:-1}
port=${MASTER_PORT:-29500}
if ((nnodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
  printf 'error: MASTER_ADDR is not set. Name a host that all others reach\n' >&2
  exit 2
fi
address=${MASTER_ADDR:-127.0.0.1}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# Sequence parallelism overlaps its messages with products only when kernels start in the order they were launched.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ -n ${NODE_RANK:-} ]]; then
  # The store of a static rendezvous outlives the processes and would lead new ones to the addresses of the dead.
  restarts=${MAX_RESTARTS:-0}
  if ((restarts > 0)); then
    printf 'error: MAX_RESTARTS=%s does not work with NODE_RANK. Leave NODE_RANK out\n' "$restarts" >&2
    exit 2
  fi
  meet=(--node-rank "$NODE_RANK" --master-addr "$address" --master-port "$port")
else
  restarts=${MAX_RESTARTS:-3}
  # For the same reason the processes get a store of their own, made anew at each start.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  meet=(--rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "${JOB_ID:-megarec}")
fi
if [[ -n ${LOCAL_ADDR:-} ]]; then
  meet+=(--local-addr "$LOCAL_ADDR")
  # An agent knows by its host's name that the others meet at it; here it has to be told.
  if [[ -z ${NODE_RANK:-} ]]; then
    meet+=(--rdzv-conf "is_host=$([[ $LOCAL_ADDR == "$address" ]] && printf 1 || printf 0)")
  fi
fi
exec torchrun --nnodes "$nnodes" --nproc-per-node "$processes" --max-restarts "$restarts" "${meet[@]}" \
  -m megarec.cli.train "$@"
