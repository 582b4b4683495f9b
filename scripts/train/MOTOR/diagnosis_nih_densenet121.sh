#!/usr/bin/env bash
# Labels of NIH ChestX-ray14 by DenseNet-121, recipes/motor/diagnosis-nih-densenet121.yaml. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
OUTPUT=${OUTPUT:-work_dirs/motor/diagnosis-nih-densenet121}
GPUS=${GPUS:-1}    # processes on this machine
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train motor/diagnosis-nih-densenet121 output_dir="$OUTPUT" "$@"
