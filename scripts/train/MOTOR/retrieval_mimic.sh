#!/usr/bin/env bash
# Image-report retrieval on MIMIC-CXR, recipes/motor/retrieval-mimic.yaml. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
PRETRAINED=${PRETRAINED:-work_dirs/motor/pretrain}  # folder of a pretraining; null starts from DeiT and SciBERT
OUTPUT=${OUTPUT:-work_dirs/motor/retrieval-mimic}
GPUS=${GPUS:-1}    # processes on this machine
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train motor/retrieval-mimic model.pretrained="$PRETRAINED" output_dir="$OUTPUT" "$@"
