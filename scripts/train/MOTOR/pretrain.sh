#!/usr/bin/env bash
# MOTOR's pretraining, recipes/motor/pretrain.yaml. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
OUTPUT=${OUTPUT:-work_dirs/motor/pretrain}
GPUS=${GPUS:-2}    # processes on this machine; published with 2
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train motor/pretrain output_dir="$OUTPUT" "$@"
