#!/usr/bin/env bash
# M3D positioning: 3-D box to name. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/medm-vl-ct/finetune}
DATA=${DATA:-data/M3D}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task m3d-reg --data "$DATA" --output "$OUTPUT" "$@"
