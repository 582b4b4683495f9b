#!/usr/bin/env bash
# M3D-Seg: name to mask. Scores the masks of another program: medm models answer with text. Further arguments go to `medm eval`.
PREDICTIONS=${PREDICTIONS:?the answers are masks, so set it to a JSONL of ids and mask files, see docs/benchmarks.md}
DATA=${DATA:-data/M3D}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
GPUS=1 launch eval --task m3d-seg --data "$DATA" --predictions "$PREDICTIONS" --output "$OUTPUT" "$@"
