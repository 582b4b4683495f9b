#!/usr/bin/env bash
# From nothing to a table of answers about volumes that were never seen. `make quickstart` calls this.
# Public commands only; a second run resumes with what the first one left.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=work_dirs/quickstart
ask=(--data $out/data/test.json --root $out/data/images --batch-size 32 --max-new-tokens 12)
newer() { [ -e "$1" ] && [ "$1" -nt "$2" ]; }
train() { # recipe, folder of the model, overrides; a run that was stopped resumes, an older model is made anew
  local resume=() recipe=$1 folder=$2
  shift 2
  if compgen -G "$folder/checkpoint-*" >/dev/null; then resume=(--resume); else rm -rf "$folder"; fi
  medm train "recipes/quickstart/$recipe.yaml" output_dir="$folder" "$@" ${resume[@]+"${resume[@]}"}
  rm -rf "$folder"/checkpoint-*
}
answer() { # folder of the model, name of the answers
  newer $out/$2.jsonl $out/$1/config.json || rm -f $out/$2.jsonl*
  medm infer --model $out/$1 "${ask[@]}" --output $out/$2.jsonl
}

python examples/quickstart/fetch.py
python examples/quickstart/prepare.py
made=$out/data/made_from.txt
newer $out/untrained/config.json $made || train pretrain $out/untrained train.num_train_epochs=0 train.max_steps=-1
answer untrained before
newer $out/pretrain/config.json $made || train pretrain $out/pretrain
newer $out/finetune/config.json $out/pretrain/config.json || train finetune $out/finetune
answer finetune after
python examples/quickstart/report.py
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
