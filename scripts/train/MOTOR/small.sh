#!/usr/bin/env bash
# MOTOR's pretraining on IU X-Ray for one GPU, recipes/motor/small.yaml. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
OUTPUT=${OUTPUT:-work_dirs/motor/small}
GPUS=${GPUS:-1}    # processes on this machine
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train motor/small output_dir="$OUTPUT" "$@"
