#!/usr/bin/env bash
# From nothing to a table of answers about blocks of CT volumes that were never seen. Public commands only; a second run
# resumes with what the first one left.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=work_dirs/quickstart_3d
newer() { [ -e "$1" ] && [ "$1" -nt "$2" ]; }
ask=(--data $out/data/test.json --root $out/data/volumes --batch-size 8 --max-new-tokens 12)
answer() { # folder of the model, name of the answers
  newer $out/$2.jsonl $out/$1/config.json || rm -f $out/$2.jsonl*
  medm infer --model $out/$1 "${ask[@]}" --output $out/$2.jsonl
}
train() { # folder of the model, overrides; a run that was stopped resumes, an older model is made anew
  local resume=() folder=$out/$1
  shift
  if compgen -G "$folder/checkpoint-*" >/dev/null; then resume=(--resume); else rm -rf "$folder"; fi
  medm train recipes/quickstart-3d/finetune.yaml output_dir="$folder" "$@" ${resume[@]+"${resume[@]}"}
  rm -rf "$folder"/checkpoint-*
}

python examples/quickstart/fetch.py 3d
python examples/quickstart_3d/blocks.py
newer $out/untrained/config.json $out/data/test.json || train untrained train.num_train_epochs=0
answer untrained before
newer $out/finetune/config.json $out/data/test.json || train finetune
answer finetune after
python examples/quickstart/report.py $out
python examples/quickstart_3d/sheet.py $out
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
