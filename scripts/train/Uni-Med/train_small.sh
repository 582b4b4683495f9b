#!/usr/bin/env bash
# Uni-Med, small. Run convert.sh first. RECIPE=uni-med/small_dense trains the dense baseline: equal experts, without a router.
# Further arguments go to `medm train`: train.max_steps=100, diagnostics.every=500, --resume ...
RECIPE=${RECIPE:-uni-med/small}
OUTPUT=${OUTPUT:-work_dirs/$RECIPE}
GPUS=${GPUS:-1}    # processes on this machine
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch train "$RECIPE" output_dir="$OUTPUT" "$@"
