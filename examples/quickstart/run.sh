#!/usr/bin/env bash
# From nothing to a table of answers about volumes that were never seen. `make quickstart` calls this.
# Public commands only; a second run goes on with what the first one left.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=work_dirs/quickstart
ask=(--data $out/data/test.json --root $out/data/images --batch-size 32 --max-new-tokens 12)
newer() { [ -e "$1" ] && [ "$1" -nt "$2" ]; }
train() { # recipe, folder of the model; a run that was stopped goes on
  local resume=()
  compgen -G "$2/checkpoint-*" >/dev/null && resume=(--resume)
  medm train "recipes/$1.yaml" ${resume[@]+"${resume[@]}"}
  rm -rf "$2"/checkpoint-*
}

python examples/quickstart/fetch.py
python examples/quickstart/prepare.py
for stage in "pretrain before data/made_from.txt" "finetune after pretrain/config.json"; do
  read -r recipe answers made_from <<<"$stage"
  newer $out/$recipe/config.json $out/$made_from || train quickstart/$recipe $out/$recipe
  newer $out/$answers.jsonl $out/$recipe/config.json || rm -f $out/$answers.jsonl*
  medm infer --model $out/$recipe "${ask[@]}" --output $out/$answers.jsonl
done
python examples/quickstart/report.py
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
