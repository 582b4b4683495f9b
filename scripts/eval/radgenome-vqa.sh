#!/usr/bin/env bash
# RadGenome chest CT slices as UniBiomed lays them out: abnormality of an anatomy and its mask. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/unibiomed/small}
PREDICTIONS=${PREDICTIONS:-}  # masks of another program in place of a model: a JSONL, see docs/evaluation.md
DATA=${DATA:-data/Biomed/RadGenome}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-${PREDICTIONS:+1}}  # processes on this machine; empty: one for each GPU, or one on the CPU
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval "--${PREDICTIONS:+predictions=}${PREDICTIONS:-model=$MODEL}" --task radgenome-vqa --data "$DATA" --output "$OUTPUT" "$@"
