#!/usr/bin/env bash
# UniBiomed's sets of 2-D segmentation: phrase to mask. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/unibiomed/small}
PREDICTIONS=${PREDICTIONS:-}  # masks of another program in place of a model: a JSONL, see docs/evaluation.md
DATA=${DATA:-data/Biomed}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-${PREDICTIONS:+1}}  # processes on this machine; empty: one for each GPU, or one on the CPU
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval "--${PREDICTIONS:+predictions=}${PREDICTIONS:-model=$MODEL}" --task unibiomed-seg2d --data "$DATA" --output "$OUTPUT" "$@"
