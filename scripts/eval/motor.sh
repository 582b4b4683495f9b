#!/usr/bin/env bash
# Every fine-tuned model of MOTOR on its own benchmark. Further arguments go to each `medm eval`. JOBS="vqa-rad:vqa-rad:vqa-rad" scores one.
MODELS=${MODELS:-work_dirs/motor}  # folder of the models, under the names of their recipes
DATA=${DATA:-data}                 # folder of the data sets
OUTPUT=${OUTPUT:-work_dirs/eval/motor}
GPUS=${GPUS:-}     # processes on this machine; empty: one for each GPU, or one on the CPU
# model:task:folder:option
JOBS=${JOBS:-report-iu:iu-xray:iu-xray report-mimic:mimic-cxr:mimic-cxr diagnosis-mimic:mimic-cxr-labels:mimic-cxr-jpg diagnosis-nih:nih-chest-xray14:nih-chest-xray14 retrieval-mimic:study-retrieval:mimic-cxr:rerank=256 retrieval-iu:study-retrieval:iu-xray:rerank=256 vqa-rad:vqa-rad:vqa-rad vqa-slake:slake:slake}
set -euo pipefail
source "$(dirname "$0")/../launch.sh"
for job in $JOBS; do
  IFS=: read -r model task folder option <<<"$job"
  (launch eval --model "$MODELS/$model" --task "$task" --data "$DATA/$folder" --output "$OUTPUT/$model" ${option:+--option "$option"} "$@")
done
