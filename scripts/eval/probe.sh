#!/usr/bin/env bash
# class-labelled sets by card: linear and few-shot classifiers on vectors. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/unimed-clip/small}
CARD=${CARD:-breast-us}  # a card or a suite, see docs/unimed-clip.md
DATA=${DATA:-data/zero-shot}  # files of the set, or a folder for each set of a suite
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task probe --option card="$CARD" --data "$DATA" --output "$OUTPUT" "$@"
