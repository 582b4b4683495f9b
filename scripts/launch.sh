# Sourced by the launchers. `launch train RECIPE ...` runs that medm command in GPUS processes on each of NODES machines.
#
# GPUS     processes on this machine; empty: one for each GPU, or one on the CPU
# NODES    number of machines; with more than one, NODE_RANK (0, 1, ...) and MASTER_ADDR must be set on each
#
# The shell becomes `medm launch`: signals to it stop the run, and its exit status is the run's.
# shellcheck shell=bash

launch() {
  local root
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if ! command -v medm >/dev/null && [ -x "$root/.venv/bin/medm" ]; then
    PATH="$root/.venv/bin:$PATH"
  fi
  export GPUS="${GPUS:-}" NODES="${NODES:-1}"
  exec medm launch "$@"
}
