#!/usr/bin/env bash
# MedM-VL-2D-3B-en, stage 1: the connector. Further arguments go to `medm train`: train.num_train_epochs=2, --resume ...
DATA=${DATA:-data/llava_pretrain_558k.json}
IMAGES=${IMAGES:-data/images}
OUTPUT=${OUTPUT:-work_dirs/medm-vl-2d/pretrain}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train medm-vl-2d/pretrain data.train.0.path="$DATA" data.train.0.root="$IMAGES" output_dir="$OUTPUT" "$@"
