#!/usr/bin/env bash
# UniBiomed's folders, as they are distributed, to the records that recipes/unibiomed train on (docs/masks.md).
DATA=${DATA:-data/Biomed}  # with 3D/, Disease/, MedTrinity/ and RadGenome/ in it
OUT=${OUT:-data/unibiomed}
set -euo pipefail
mkdir -p "$OUT"
for pair in segmentation-2d="$DATA" segmentation-3d="$DATA/3D" disease="$DATA/Disease" region="$DATA/Disease" \
  medtrinity="$DATA/MedTrinity" radgenome-report="$DATA/RadGenome" radgenome-vqa="$DATA/RadGenome"; do
  medm data convert "$OUT/${pair%%=*}.json" --task "unibiomed/${pair%%=*}" --data "${pair#*=}" --seed 42
done
