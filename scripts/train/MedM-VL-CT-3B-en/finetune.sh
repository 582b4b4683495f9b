#!/usr/bin/env bash
# MedM-VL-CT-3B-en, stage 2: LLM and connector, from the result of stage 1. Further arguments go to `medm train`.
DATA=${DATA:-data/m3d_finetune.json}
VOLUMES=${VOLUMES:-data/M3D}
FROM=${FROM:-work_dirs/medm-vl-ct/pretrain}
OUTPUT=${OUTPUT:-work_dirs/medm-vl-ct/finetune}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train medm-vl-ct/finetune data.train.0.path="$DATA" data.train.0.root="$VOLUMES" init_from="$FROM" output_dir="$OUTPUT" "$@"
