#!/usr/bin/env bash
# Finetune on your own JSON, from published weights (opened once with `medm import`) or from your own result.
DATA=${DATA:-data/finetune.json}
IMAGES=${IMAGES:-data/images}
FROM=${FROM:-work_dirs/medm-vl-2d/finetune}
TUNE=${TUNE:-lora}  # lora: adapters in the LLM and the connector in full; full: every weight
RECIPE=${RECIPE:-medm-vl-2d/finetune$([ "$TUNE" = lora ] && echo _lora)}
OUTPUT=${OUTPUT:-work_dirs/finetune_$TUNE}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
case $TUNE in lora | full) ;; *) echo "TUNE=$TUNE: expected lora or full" >&2 && exit 2 ;; esac
source "$(dirname "$0")/../launch.sh"
launch train "$RECIPE" data.train.0.path="$DATA" data.train.0.root="$IMAGES" init_from="$FROM" output_dir="$OUTPUT" "$@"
