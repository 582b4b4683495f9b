#!/usr/bin/env bash
# MedTrinity as UniBiomed lays it out: image to caption. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/unibiomed/small}
DATA=${DATA:-data/Biomed/MedTrinity}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task medtrinity-report --data "$DATA" --output "$OUTPUT" "$@"
