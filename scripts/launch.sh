# Sourced by the launchers. `launch train RECIPE ...` runs that medm command in GPUS processes on each of NODES machines.
#
# GPUS     processes on this machine; empty: one for each GPU that nvidia-smi lists, or one on the CPU
# NODES    number of machines; with more than one, NODE_RANK (0, 1, ...) and MASTER_ADDR must be set on each
# shellcheck shell=bash

launch() {
  local root processes place
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if ! command -v torchrun >/dev/null && [ -x "$root/.venv/bin/torchrun" ]; then
    PATH="$root/.venv/bin:$PATH"
  fi
  processes="${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}"
  if [ "$processes" -lt 1 ]; then processes=1; fi
  if [ "$processes" -gt 1 ]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > processes ? $(nproc) / processes : 1 ))}"
  fi
  if [ "${NODES:-1}" -gt 1 ]; then
    place=(--nnodes "$NODES" --node-rank "${NODE_RANK:?the number of this machine, from 0}"
      --master-addr "${MASTER_ADDR:?the address of machine 0}" --master-port "${MASTER_PORT:-29500}")
  else
    place=(--standalone)
  fi
  torchrun "${place[@]}" --nproc-per-node "$processes" -m medm "$@"
}
