#!/usr/bin/env bash
# UniBiomed, recipes/unibiomed/subset.yaml. Further arguments go to `medm train`.
OUTPUT=${OUTPUT:-work_dirs/unibiomed/subset}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train unibiomed/subset output_dir="$OUTPUT" "$@"
