#!/usr/bin/env bash
# From nothing to a table of zero-shot scores on volumes that were never seen, and the trained tower in a
# vision-language model. `make quickstart-clip` calls this. Public commands only; a second run resumes with what the
# first one left, and what was made from other data or another recipe is made again.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=work_dirs/quickstart/data
out=work_dirs/quickstart_clip
newer() { [ -e "$1" ] && [ "$1" -nt "$2" ]; }
train() { # recipe, folder of the model, overrides; a run that was stopped resumes, an older model is made anew
  local resume=() recipe=$1 folder=$2
  shift 2
  if compgen -G "$folder/checkpoint-*" >/dev/null; then resume=(--resume); else rm -rf "$folder"; fi
  medm train "recipes/quickstart-clip/$recipe.yaml" output_dir="$folder" "$@" ${resume[@]+"${resume[@]}"}
  rm -rf "$folder"/checkpoint-*
}
score() { # model, zero-shot and retrieval
  newer $out/$1/scores/retrieval/results.json $out/$1/config.json && return
  rm -rf $out/$1/scores
  medm eval examples/quickstart_clip/scores.yaml --model $out/$1 --output $out/$1/scores
}
lvlm() { # tower: a connector is trained behind it, and asked for captions
  newer $out/$1/tower/config.json $out/$1/config.json || { rm -rf $out/$1/tower; medm export --format encoder --model $out/$1 $out/$1/tower; }
  newer $out/$1/lvlm/config.json $out/$1/tower/config.json || train lvlm $out/$1/lvlm \
    model.branches.image.encoder.path=$out/$1/tower data.cache_features=$out/$1/features
  newer $out/$1/captions.jsonl $out/$1/lvlm/config.json || rm -f $out/$1/captions.jsonl*
  medm infer --model $out/$1/lvlm --data $data/captions_test.json --root $data/images --batch-size 32 --max-new-tokens 24 \
    --output $out/$1/captions.jsonl
}

python examples/quickstart/fetch.py clip
python examples/quickstart/prepare.py
python examples/quickstart_clip/pairs.py
made=$data/pairs_train.jsonl
newer $out/untrained/config.json $made || train pretrain $out/untrained train.num_train_epochs=0
newer $out/trained/config.json $made || train pretrain $out/trained
for model in untrained trained; do
  score $model
  lvlm $model
done
python examples/quickstart_clip/report.py
echo "Took $((SECONDS / 60)) min $((SECONDS % 60)) s. Not for clinical use."
