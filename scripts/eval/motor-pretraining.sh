#!/usr/bin/env bash
# What a pretraining of MOTOR gives before it is fine-tuned: retrieval, labels, reports in one run. Further arguments go to `medm eval`: --against OTHER_OUTPUT, tasks.0.data=FOLDER ...
MODEL=${MODEL:-work_dirs/motor/pretrain}
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval "$(dirname "$0")/motor-pretraining.yaml" --model "$MODEL" --output "$OUTPUT" "$@"
