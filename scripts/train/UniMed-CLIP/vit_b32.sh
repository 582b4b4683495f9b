#!/usr/bin/env bash
# UniMed-CLIP ViT-B/32. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
METACLIP=${METACLIP:-.assets/metaclip/b32_400m.pt}
OUTPUT=${OUTPUT:-work_dirs/unimed-clip/vit-b32}
GPUS=${GPUS:-4}    # processes on this machine; 16 in all keep the batch of 2048
NODES=${NODES:-4}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train unimed-clip/vit-b32 model.image.encoder.path="$METACLIP" output_dir="$OUTPUT" "$@"
