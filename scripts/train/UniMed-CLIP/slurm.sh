#!/usr/bin/env bash
# UniMed-CLIP under Slurm, from the checkout: sbatch --partition=NAME --nodes=4 --time=1-24:00:00 scripts/train/UniMed-CLIP/slurm.sh
# Five minutes before the time limit the run writes a checkpoint, and the job is queued again and resumes.
#SBATCH --job-name=unimed-clip --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=64
#SBATCH --requeue --open-mode=append --signal=TERM@300
LAUNCHER=${LAUNCHER:-scripts/train/UniMed-CLIP/vit_b16.sh}
GPUS=${GPUS:-4}  # processes on each machine, as many as --gpus-per-node
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export LAUNCHER GPUS MASTER_ADDR NODES="$SLURM_JOB_NUM_NODES"
status=0
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$LAUNCHER" "$@"' launcher --resume "$@" || status=$?
if [ "$status" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi  # 75: stopped with a checkpoint
exit "$status"
