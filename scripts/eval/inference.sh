#!/usr/bin/env bash
# Batch inference. A run that was stopped resumes with the same command. Further arguments go to `medm infer`.
MODEL=${MODEL:-work_dirs/medm-vl-2d/finetune}
DATA=${DATA:-docs/example_inference.json}
IMAGES=${IMAGES:-$(dirname "$DATA")}
OUTPUT=${OUTPUT:-work_dirs/inference.jsonl}  # one line per record, written as it is answered; all of them as .json beside it
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch infer --model "$MODEL" --data "$DATA" --root "$IMAGES" --output "$OUTPUT" --json "${OUTPUT%.jsonl}.json" "$@"
