#!/usr/bin/env bash
# Train with several processes, one a GPU (or on CPU, without GPUs):
#   bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each of them.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo 'usage: bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]' >&2
  exit 2
fi
config=$1
processes=$2
shift 2
root=$(dirname "$(dirname "$(realpath "$0")")")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m torch.distributed.run \
  --nnodes "${NNODES:-1}" \
  --node_rank "${NODE_RANK:-0}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" \
  --master_port "${PORT:-29500}" \
  --nproc_per_node "$processes" \
  "$root/tools/train.py" "$config" "$@"
