#!/usr/bin/env bash
# M3D-CLIP: CT volumes and reports. First: medm data convert data/m3d-cap_train.jsonl --task m3d/cap --data data/M3D
DATA=${DATA:-data/m3d-cap_train.jsonl}
VOLUMES=${VOLUMES:-data/M3D}
OUTPUT=${OUTPUT:-work_dirs/m3d-clip/pretrain}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train m3d-clip/pretrain data.train.0.path="$DATA" data.train.0.root="$VOLUMES" output_dir="$OUTPUT" "$@"
