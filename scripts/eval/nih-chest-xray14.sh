#!/usr/bin/env bash
# NIH ChestX-ray14, 14 labels by the official lists. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/motor/diagnosis-nih}
DATA=${DATA:-data/nih-chest-xray14}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task nih-chest-xray14 --data "$DATA" --output "$OUTPUT" "$@"
