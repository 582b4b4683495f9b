#!/usr/bin/env bash
# MIMIC-CXR-JPG, 14 labels of CheXpert or NegBio by the official split. Further arguments go to `medm eval`.
MODEL=${MODEL:-work_dirs/motor/diagnosis-mimic}
DATA=${DATA:-data/mimic-cxr-jpg}  # the benchmark's folder as it is distributed
OUTPUT=${OUTPUT:-work_dirs/eval}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
NODES=${NODES:-1}  # machines; with more than one, set NODE_RANK and MASTER_ADDR on each
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
launch eval --model "$MODEL" --task mimic-cxr-labels --data "$DATA" --output "$OUTPUT" "$@"
