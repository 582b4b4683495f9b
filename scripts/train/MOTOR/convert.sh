#!/usr/bin/env bash
# The data sets of MOTOR, as they are distributed, to the studies that recipes/motor train on.
# SETS="iu-xray slake" converts some of them.
MIMIC=${MIMIC:-data/mimic-cxr}                # R2Gen's annotation.json and images/; beside them, CheXpert's CSV of MIMIC-CXR-JPG, unpacked
MIMIC_JPG=${MIMIC_JPG:-data/mimic-cxr-jpg}    # MIMIC-CXR-JPG: files/, and the CSV files of the split and of CheXpert's labels
IU_XRAY=${IU_XRAY:-data/iu-xray}              # R2Gen's annotation.json and images/
NIH=${NIH:-data/nih-chest-xray14}             # Data_Entry_2017.csv, both official lists, images/
VQA_RAD=${VQA_RAD:-data/vqa-rad}
SLAKE=${SLAKE:-data/slake}
OUT=${OUT:-data/motor}
SETS=${SETS:-mimic-cxr mimic-cxr-labels iu-xray nih-chest-xray14 vqa-rad slake}
set -euo pipefail
mkdir -p "$OUT"

convert() { # name, source, folder, splits
  local split
  for split in $4; do
    medm data convert "$OUT/$1-$split.jsonl" --task "$2" --data "$3" --split "$split"
  done
}

for set in $SETS; do
  case $set in
  mimic-cxr) convert "$set" studies/annotation "$MIMIC" "train val" ;;
  mimic-cxr-labels) convert "$set" studies/mimic-cxr "$MIMIC_JPG" "train val" ;;
  iu-xray) convert "$set" studies/annotation "$IU_XRAY" "train val" ;;
  nih-chest-xray14) convert "$set" studies/nih-chest-xray14 "$NIH" "train val" ;;
  vqa-rad) convert "$set" studies/vqa-rad "$VQA_RAD" train ;;
  slake) convert "$set" studies/slake "$SLAKE" train ;;
  *) echo "$set: no such set; choose from mimic-cxr mimic-cxr-labels iu-xray nih-chest-xray14 vqa-rad slake" >&2 && exit 2 ;;
  esac
  case $set in
  # The release's *_kg_AO.json lie beside the annotation where somebody has them; without them rules read the reports.
  mimic-cxr | iu-xray)
    grep -q '"triplets"' "$OUT/$set-train.jsonl" && continue
    medm data triplets "$OUT/$set-train.jsonl" "$OUT/$set-triplets.jsonl"
    mv "$OUT/$set-triplets.jsonl" "$OUT/$set-train.jsonl"
    ;;
  vqa-rad | slake) medm data answers "$OUT/$set-answers.json" "$OUT/$set-train.jsonl" ;;
  esac
done
