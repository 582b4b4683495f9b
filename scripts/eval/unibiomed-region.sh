#!/usr/bin/env bash
# UniBiomed's region understanding: box on an image to its name. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/unibiomed/region}
DATA=${DATA:-data/Biomed/Disease}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task unibiomed-region --data "$DATA" --output "$OUTPUT" "$@"
