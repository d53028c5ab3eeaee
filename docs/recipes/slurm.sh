#!/bin/bash
# Two nodes of eight GPUs, one process per GPU; submit with `sbatch docs/recipes/slurm.sh`.
#SBATCH --job-name=mpjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

run=/shared/runs/ssd300 # on a file system that all nodes share
resume=()
if [ -e "$run/config.json" ]; then resume=(--resume); fi

# JAX finds the other processes, and each its GPU, by Slurm's variables. A process that
# dies ends all; the job starts again from the last checkpoint, five times at most, but
# not where flags or data are wrong (2).
status=0
srun --kill-on-bad-exit=1 python -m experiments.ssd_digits \
  --preset ssd300 --dataset voc --data-dir /shared/VOCdevkit \
  --distributed --mesh data=-1 --workdir "$run" "${resume[@]}" || status=$?
if [ "$status" -gt 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
