#!/usr/bin/env bash
# M3D-LaMed's segmentation, recipes/m3d-lamed/seg.yaml. Further arguments go to `medm train`.
OUTPUT=${OUTPUT:-work_dirs/m3d-lamed/seg}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train m3d-lamed/seg output_dir="$OUTPUT" "$@"
