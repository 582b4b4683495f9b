#!/usr/bin/env bash
# image-report retrieval on studies, both ways (IU X-Ray, MIMIC-CXR by R2Gen's annotation.json). Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/motor/retrieval-mimic}
DATA=${DATA:-data/mimic-cxr}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task study-retrieval --data "$DATA" --output "$OUTPUT" "$@"
