#!/usr/bin/env bash
# UniBiomed, recipes/unibiomed/published.yaml. Further arguments go to `medm train`.
OUTPUT=${OUTPUT:-work_dirs/unibiomed/published}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train unibiomed/published output_dir="$OUTPUT" "$@"
