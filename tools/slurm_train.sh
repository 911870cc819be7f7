#!/usr/bin/env bash
# Train under Slurm, one process a GPU:
#   GPUS=16 GPUS_PER_NODE=8 bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments]
# CPUS_PER_TASK (default 8) and SRUN_ARGS are handed to srun.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo 'usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments]' >&2
  exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
root=$(dirname "$(dirname "$(realpath "$0")")")
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then per_node=$gpus; fi
if [ $((gpus % per_node)) -ne 0 ]; then
  echo "error: GPUS=$gpus is not a multiple of GPUS_PER_NODE=$per_node" >&2
  exit 2
fi
# One launcher a node, which starts the node's processes itself.
# shellcheck disable=SC2016,SC2086
exec srun -p "$partition" --job-name="$job_name" \
  --nodes=$((gpus / per_node)) --ntasks-per-node=1 --gres=gpu:"$per_node" \
  --cpus-per-task=$((per_node * ${CPUS_PER_TASK:-8})) --kill-on-bad-exit=1 \
  ${SRUN_ARGS:-} bash -c '
    export NNODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID PORT=${PORT:-29500}
    export MASTER_ADDR=$(scontrol show hostnames "$SLURM_NODELIST" | head -n 1)
    exec bash "$@"' _ "$root/tools/dist_train.sh" "$config" "$per_node" "$@"
