#!/usr/bin/env bash
# UniMed-CLIP ViT-B/16 under Slurm: writes unimed-clip.sbatch. Further arguments go to `medm launch slurm`: --partition=NAME --submit ...
RECIPE=${RECIPE:-unimed-clip/vit-b16}
METACLIP=${METACLIP:-.assets/metaclip/b16_400m.pt}
OUTPUT=${OUTPUT:-work_dirs/unimed-clip/vit-b16}
GPUS=${GPUS:-4}    # of each machine, with one rank each; published with 16 in all
NODES=${NODES:-4}  # machines
set -euo pipefail
source "$(dirname "$0")/../../launch.sh"
launch slurm "$RECIPE" model.image.encoder.path="$METACLIP" output_dir="$OUTPUT" --time 1-24:00:00 --cpus-per-task 16 --output unimed-clip.sbatch "$@"
