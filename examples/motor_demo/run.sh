#!/usr/bin/env bash
# Pretraining on studies without knowledge, with a graph and a memory, and with a shuffled graph, three seeds each, scored on
# held-out volumes. `make motor-demo` calls this. Public commands only; a second run resumes with what the first one left,
# and what was made from other data, another recipe or other overrides is made again. TRAIN="train.max_steps=2" for a try.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=work_dirs/quickstart/data
out=work_dirs/motor_demo
read -r -a more <<<"${TRAIN:-}"

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

python examples/quickstart/fetch.py motor
python examples/quickstart/prepare.py
python examples/motor_demo/studies.py
for seed in 1 2 3; do
  for model in plain knowledge shuffled; do
    folder=$out/$model-$seed
    recipe=recipes/motor-demo/$model.yaml
    keep_if $folder "$(made_from $recipe examples/motor_demo/graph.json $data/studies_train.jsonl -- "$seed ${TRAIN:-}")"
    resume=()
    compgen -G "$folder/checkpoint-*" >/dev/null && resume=(--resume)
    [ -e $folder/config.json ] ||
      medm train $recipe output_dir=$folder train.seed=$seed ${resume[@]+"${resume[@]}"} ${more[@]+"${more[@]}"}
    rm -rf "$folder"/checkpoint-*
    keep_if $folder/scores "$(made_from $data/studies_test.jsonl examples/motor_demo/scores.yaml -- $model)"
    [ -e $folder/scores/study-labels/results.json ] ||
      medm eval examples/motor_demo/scores.yaml --model $folder --output $folder/scores
  done
done
python examples/motor_demo/report.py
echo "Pages: $out/*/scores/*/report.html"
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
