#!/usr/bin/env bash
# Several tasks, experts against the dense baseline of equal size, scored on held-out volumes. `make uni-med-demo` calls
# this. Public commands only; a second run resumes with what the first one left, and what was made from other data, an
# other recipe or other overrides is made again. TRAIN="train.max_steps=2" for a try.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=work_dirs/quickstart/data
out=work_dirs/uni_med_demo
read -r -a more <<<"${TRAIN:-}"
read -r -a asked <<<"${EVAL:-}"

made_from() { # files, then -- and words: one line that changes with any of them
  local files=()
  while [ "$1" != -- ]; do files+=("$1") && shift; done
  echo "$(cat "${files[@]}" | cksum) ${*:2}"
}
keep_if() { # folder, what it has to be made from: a folder that was made from something else is emptied
  [ "$(cat "$1/made_from.txt" 2>/dev/null)" = "$2" ] && return
  rm -rf "$1"
  mkdir -p "$1"
  echo "$2" >"$1/made_from.txt"
}
train() { # model; a run that was stopped resumes
  local resume=()
  compgen -G "$out/$1/checkpoint-*" >/dev/null && resume=(--resume)
  medm train recipes/uni-med-demo/$1.yaml ${resume[@]+"${resume[@]}"} ${more[@]+"${more[@]}"}
  rm -rf "$out/$1"/checkpoint-* "$out/scores/$1"
}

python examples/quickstart/fetch.py
python examples/quickstart/prepare.py
python examples/uni_med_demo/split.py
for model in dense experts; do
  recipe=$(made_from recipes/uni-med-demo/$model.yaml $data/demo_train.json $data/made_from.txt -- "${TRAIN:-}")
  keep_if $out/$model "$recipe"
  [ -e $out/$model/config.json ] || train $model
  for job in "vqa [normalised-match,token-f1]" "cls [normalised-match]" "rec [box-iou,box-accuracy]" \
    "reg [normalised-match,token-f1]" "caption [bleu,rouge]"; do
    task=${job%% *}
    scores=$out/scores/$model/$task
    keep_if $scores "$(made_from $data/test_$task.json -- "$recipe" "${EVAL:-}")"
    medm eval --model $out/$model --task custom --data $data --option path=test_$task.json \
      --option metrics="${job#* }" --option cluster_by=source_volume --option group_by="[question_type]" \
      --output $scores --batch-size 32 --max-new-tokens 32 ${asked[@]+"${asked[@]}"}
  done
done
python examples/uni_med_demo/report.py
echo "Pages: $out/scores/*/*/custom/report.html; gradients between tasks: $out/*/diagnostics/tug_of_war.md"
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
