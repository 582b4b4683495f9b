#!/usr/bin/env bash
# The 12 data sets of Uni-Med, as they are distributed, to the records that recipes/uni-med train on.
SLAKE=${SLAKE:-data/slake}
PATH_VQA=${PATH_VQA:-data/path-vqa}
SA_MED2D=${SA_MED2D:-data/sa-med2d}
MEDPIX=${MEDPIX:-data/medpix}
MIMIC=${MIMIC:-data/mimic-cxr}
MEDMNIST=${MEDMNIST:-data/medmnist}
MEDQA=${MEDQA:-data/medqa}
PUBMEDQA=${PUBMEDQA:-data/pubmedqa}
OUT=${OUT:-data/uni-med}
set -euo pipefail
mkdir -p "$OUT"
for pair in medqa="$MEDQA" pubmedqa="$PUBMEDQA" slake-vqa="$SLAKE" slake-rec="$SLAKE" slake-reg="$SLAKE" \
  path-vqa="$PATH_VQA" sa-med2d-rec="$SA_MED2D" sa-med2d-reg="$SA_MED2D" medpix="$MEDPIX" mimic-caption="$MIMIC" \
  medmnist-derma="$MEDMNIST" medmnist-organs="$MEDMNIST"; do
  medm data convert "$OUT/${pair%%=*}.json" --task "${pair%%=*}" --data "${pair#*=}" --seed 42
done
