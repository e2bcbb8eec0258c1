#!/usr/bin/env bash
# From a bare machine with Python 3.11 or newer to LoRA and FLix compared on the embedded benchmark.
# Arguments are passed on to `flix sweep`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
cd "$ROOT"

ensure_environment
# The network is too small to be split over threads: one is faster than several.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" XLA_FLAGS="${XLA_FLAGS:---xla_cpu_multi_thread_eigen=false}"
say "comparing LoRA and FLix on Babel, the embedded benchmark"
"$VENV/bin/python" -m flix_jax.cli sweep \
  --gin_file=configs/sweeps/babel_quickstart.gin --run_dir=runs/quickstart "$@"
say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s; table, picture and runs are in the sweep's folder, runs/quickstart"
