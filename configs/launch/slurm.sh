#!/bin/bash
# Trains on a cluster that runs SLURM:
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 configs/launch/slurm.sh CONFIG [OPTIONS OF crbp fit]
#
# One task is one process with one GPU. Five minutes before its time is over the job is signalled, saves its state and
# puts itself back into the queue, where it goes on from there; so does a job that SLURM preempts. Where DATA names a
# folder, such as that of COCO, each node gets a copy of it on its own disk, and the images are read from there. Contours
# that are generated need none.
#SBATCH --job-name=crbp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=crbp-%j.log
set -euo pipefail

config=${1:?which configuration? for example configs/pathfinder/pf14_hgru_crbp.yaml}
shift
name=$(basename "$config" .yaml)
options=(
  --config "$config"
  --trainer.num_nodes "$SLURM_NNODES"
  --trainer.devices "$SLURM_NTASKS_PER_NODE"
  --trainer.logger.version "job_$SLURM_JOB_ID"  # the same when the job is back from the queue
)
last=runs/$name/job_$SLURM_JOB_ID/checkpoints/last.ckpt
if [[ -e $last ]]; then
  options+=(--ckpt_path "$last")
fi
if [[ -n ${DATA:-} ]]; then
  local_data=${TMPDIR:-/tmp}/crbp-$SLURM_JOB_ID
  srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    cp --recursive --update --preserve=timestamps --no-target-directory "$DATA" "$local_data"
  options+=(--data.source.root "$local_data")
fi

# Where a process is lost, the others are ended a minute later, and the job fails.
status=0
srun --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" crbp fit "${options[@]}" "$@" || status=$?
if ((status == 128 + $(kill -l USR1))); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
