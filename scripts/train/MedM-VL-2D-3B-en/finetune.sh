#!/usr/bin/env bash
# MedM-VL-2D-3B-en, stage 2: every part, from the result of stage 1. Further arguments go to `medm train`.
DATA=${DATA:-data/unimed_train.json}
IMAGES=${IMAGES:-data/images}
FROM=${FROM:-work_dirs/medm-vl-2d/pretrain}
OUTPUT=${OUTPUT:-work_dirs/medm-vl-2d/finetune}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train medm-vl-2d/finetune data.train.0.path="$DATA" data.train.0.root="$IMAGES" init_from="$FROM" output_dir="$OUTPUT" "$@"
