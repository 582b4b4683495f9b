#!/usr/bin/env bash
# UniMed-CLIP ViT-B/16 as published. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
METACLIP=${METACLIP:-.assets/metaclip/b16_400m.pt}
OUTPUT=${OUTPUT:-work_dirs/unimed-clip/vit-b16}
GPUS=${GPUS:-4}    # processes on this machine; published with 16 in all, or with 8
NODES=${NODES:-4}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train unimed-clip/vit-b16 model.image.encoder.path="$METACLIP" output_dir="$OUTPUT" "$@"
