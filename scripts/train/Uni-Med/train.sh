#!/usr/bin/env bash
# Uni-Med as published, in its one stage. Run convert.sh first. Further arguments go to `medm train`: --resume ...
LLM=${LLM:-meta-llama/Llama-2-7b-chat-hf}
ENCODER=${ENCODER:-.assets/eva_vit_g.pth}
OUTPUT=${OUTPUT:-work_dirs/uni-med/published}
GPUS=${GPUS:-1}    # published on one; processes on this machine
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train uni-med/published model.llm.path="$LLM" model.branches.image.encoder.path="$ENCODER" output_dir="$OUTPUT" "$@"
