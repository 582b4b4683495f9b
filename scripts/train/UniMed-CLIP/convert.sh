#!/usr/bin/env bash
# The 13 sources of UniMed, as they are distributed, to the records that recipes/unimed-clip train on.
# SOURCES="rocov2 pmc-oa" converts some of them; recipes then need data.train without the others.
CHEXPERT=${CHEXPERT:-data/CheXpert-v1.0-small}
MIMIC=${MIMIC:-data/mimic-cxr-jpg}
OPENI=${OPENI:-data/openi}
CHEST_XRAY8=${CHEST_XRAY8:-data/chest_xray8}
RADIMAGENET=${RADIMAGENET:-data/radimagenet}
RETINA=${RETINA:-data/Retina-Datasets}
QUILT=${QUILT:-data/Quilt}
PMC_OA=${PMC_OA:-data/pmc_oa}
ROCOV2=${ROCOV2:-data/ROCOV2}
LLAVA_MED=${LLAVA_MED:-data/llava_med}
OUT=${OUT:-data/unimed}
SOURCES=${SOURCES:-}
set -euo pipefail
mkdir -p "$OUT"
for pair in chexpert="$CHEXPERT" mimic-cxr="$MIMIC" openi="$OPENI" chest-xray8="$CHEST_XRAY8" radimagenet="$RADIMAGENET" \
  retina-part1="$RETINA" retina-part2="$RETINA" retina-part3="$RETINA" quilt-1m="$QUILT" pmc-oa="$PMC_OA" rocov2="$ROCOV2" \
  llava-med-alignment="$LLAVA_MED" llava-med-instruct="$LLAVA_MED"; do
  source=${pair%%=*}
  [[ -z "$SOURCES" || " $SOURCES " == *" $source "* ]] || continue
  medm data convert "$OUT/$source.jsonl" --task "unimed/$source" --data "${pair#*=}"
done
