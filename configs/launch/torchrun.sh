#!/bin/bash
# Trains on the GPUs of this machine, or of several: call it on each of them, with NODES, NODE from 0 on, and the name of
# the first machine as MASTER.
#
#   configs/launch/torchrun.sh CONFIG [OPTIONS OF crbp fit]
#   NODES=2 NODE=0 MASTER=first configs/launch/torchrun.sh CONFIG
#
# Called again, it goes on from the state that was saved last, which all machines have to see: runs/ must be shared. Where a process is lost, torchrun ends the others. SIGTERM
# saves the state first; what a batch and the saving take must be less than the time given here.
set -euo pipefail

config=${1:?which configuration? for example configs/pathfinder/pf14_hgru_crbp.yaml}
shift
name=$(basename "$config" .yaml)
processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
last=runs/$name/${RUN:=torchrun}/checkpoints/last.ckpt
options=(
  --config "$config"
  --trainer.num_nodes "${NODES:-1}"
  --trainer.devices "$processes"
  --trainer.logger.version "$RUN"
)
if [[ -e $last ]]; then
  options+=(--ckpt_path "$last")
fi
exec torchrun \
  --nnodes="${NODES:-1}" --node-rank="${NODE:-0}" --nproc-per-node="$processes" \
  --master-addr="${MASTER:-127.0.0.1}" --master-port="${PORT:-29500}" \
  --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=120 \
  -m crbp.cli fit "${options[@]}" "$@"
