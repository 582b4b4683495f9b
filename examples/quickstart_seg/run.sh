#!/usr/bin/env bash
# From nothing to masks on volumes that were never seen, beside a constant mask and a threshold. `make quickstart-seg`
# calls this. Public commands only; a second run resumes with what the first one left, and what was made from other data
# or another recipe is made again. TRAIN="train.max_steps=2" for a try.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=work_dirs/quickstart_seg
read -r -a more <<<"${TRAIN:-}"
train() { # recipe, folder of the model; a run that was stopped resumes
  [ -e "$out/$2/config.json" ] && return
  local resume=()
  compgen -G "$out/$2/checkpoint-*" >/dev/null && resume=(--resume)
  medm train recipes/quickstart-seg/$1.yaml ${resume[@]+"${resume[@]}"} ${more[@]+"${more[@]}"}
  rm -rf "$out/$2"/checkpoint-*
}

python examples/quickstart/fetch.py seg
python examples/quickstart_seg/masks.py
made_from="$(cat recipes/quickstart-seg/*.yaml $out/data/made_from.txt | cksum) ${TRAIN:-}"
if [ "$(cat $out/models_made_from.txt 2>/dev/null)" != "$made_from" ]; then
  rm -rf $out/answers $out/model $out/replies* $out/*-ct-*
  echo "$made_from" >$out/models_made_from.txt
fi
train finetune answers
train masks model
medm infer --model $out/model --data $out/data/test.json --root $out/data --batch-size 32 --max-new-tokens 16 \
  --output $out/replies.jsonl --overlays
whole() { # volume, window: each slice by itself, the masks on the grid of the volume. The language model is shown one
  # slice, as in training: with five, the state at [SEG] is one that the head has never seen.
  medm infer --model $out/model --data $out/data/$1.json --root examples/quickstart/data --max-new-tokens 16 \
    --volume-mode slices --slices 1 --slice-choice uniform --slice-window=$2 --output $out/$1.jsonl --overlays
}
whole chest-ct-2 -1000,400
whole abdomen-ct-2 -160,240
python examples/quickstart_seg/report.py
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
