#!/usr/bin/env bash
# UniMed-CLIP on one GPU: 1024 pairs a step in chunks. Run convert.sh first. Further arguments go to `medm train`: train.max_steps=100, --resume ...
METACLIP=${METACLIP:-.assets/metaclip/b16_400m.pt}
OUTPUT=${OUTPUT:-work_dirs/unimed-clip/small}
GPUS=${GPUS:-1}    # processes on this machine; the batch grows with them
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train unimed-clip/small model.image.encoder.path="$METACLIP" output_dir="$OUTPUT" "$@"
