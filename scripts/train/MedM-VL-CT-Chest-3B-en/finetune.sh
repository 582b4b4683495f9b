#!/usr/bin/env bash
# MedM-VL-CT-Chest-3B-en, stage 2: every part, from the result of stage 1. Further arguments go to `medm train`.
DATA=${DATA:-data/ctrate_train_all.json}
VOLUMES=${VOLUMES:-data/CT-RATE}
FROM=${FROM:-work_dirs/medm-vl-ct-chest/pretrain}
OUTPUT=${OUTPUT:-work_dirs/medm-vl-ct-chest/finetune}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train medm-vl-ct-chest/finetune data.train.0.path="$DATA" data.train.0.root="$VOLUMES" init_from="$FROM" output_dir="$OUTPUT" "$@"
