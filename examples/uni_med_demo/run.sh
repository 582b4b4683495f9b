#!/usr/bin/env bash
# Several tasks, experts against the dense baseline of equal size, scored on held-out volumes. `make uni-med-demo` calls
# this. Public commands only; a second run goes on with what the first one left. TRAIN="train.max_steps=2" for a try.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=work_dirs/quickstart/data
out=work_dirs/uni_med_demo
read -r -a more <<<"${TRAIN:-}"
read -r -a asked <<<"${EVAL:-}"

python examples/quickstart/fetch.py
python examples/quickstart/prepare.py
python examples/uni_med_demo/split.py
score() { # model, task, metrics, what to compare with ...
  medm eval --model "$out/$1" --task custom --data $data --option path="test_$2.json" --option metrics="$3" \
    --option "group_by=[question_type, source_volume]" --output "$out/scores/$1/$2" --batch-size 32 \
    --max-new-tokens 32 "${@:4}" ${asked[@]+"${asked[@]}"}
}
for model in dense experts; do
  [ -e $out/$model/config.json ] || medm train recipes/uni-med-demo/$model.yaml --resume ${more[@]+"${more[@]}"}
  against=()
  for job in "vqa [normalised-match,token-f1]" "cls [normalised-match]" "rec [box-iou,box-accuracy]" \
    "reg [normalised-match,token-f1]" "caption [bleu,rouge]"; do
    task=${job%% *}
    [ $model = dense ] || against=(--against "$out/scores/dense/$task/custom")
    score $model "$task" "${job#* }" ${against[@]+"${against[@]}"}
  done
done
echo "Tables: $out/scores/*/*/summary.md; gradients between tasks: $out/*/diagnostics/tug_of_war.md"
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
