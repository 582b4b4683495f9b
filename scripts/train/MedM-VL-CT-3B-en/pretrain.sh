#!/usr/bin/env bash
# MedM-VL-CT-3B-en, stage 1: the connector. Further arguments go to `medm train`: train.num_train_epochs=2, --resume ...
DATA=${DATA:-data/m3d_pretrain.json}
VOLUMES=${VOLUMES:-data/M3D}
OUTPUT=${OUTPUT:-work_dirs/medm-vl-ct/pretrain}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train medm-vl-ct/pretrain data.train.0.path="$DATA" data.train.0.root="$VOLUMES" output_dir="$OUTPUT" "$@"
