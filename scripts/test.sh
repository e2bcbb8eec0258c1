#!/usr/bin/env bash
# Makes the environment and checks everything: style, types, imports, tests.
#
#   ./scripts/test.sh              all tests
#   ./scripts/test.sh --fast       all but the slow ones
#   ./scripts/test.sh tests/test_cli.py -k help     further arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
cd "$ROOT"

passes=("not slow" "slow")
if [[ "${1:-}" == "--fast" ]]; then
  passes=("not slow")
  shift
fi

ensure_environment test
python="$VENV/bin/python"
failed=()
check() {
  local name="$1"
  shift
  say "$name"
  "$@" || failed+=("$name")
}

check "ruff" "$python" -m ruff check .
check "ruff format" "$python" -m ruff format --check --quiet .
check "mypy" "$python" -m mypy
check "import-linter" "$VENV/bin/lint-imports" --no-logo

export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 GRPC_VERBOSITY=ERROR
# The workers share what they compile; the folder lasts as long as this script.
JAX_COMPILATION_CACHE_DIR="$(mktemp -d)"
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

ran=0
run_pytest() {
  local status=0
  "$python" -m pytest --numprocesses="${FLIX_TEST_WORKERS:-2}" --dist=loadfile --durations=10 "$@" || status=$?
  # 5: no test matches, as when a file is named that has no slow ones.
  if [[ $status == 5 ]]; then return; fi
  ran=1
  return "$status"
}
for marker in "${passes[@]}"; do
  check "pytest ($marker)" run_pytest -m "$marker" "$@"
done
if [[ $ran == 0 ]]; then failed+=("pytest: no test matches"); fi

if ((${#failed[@]})); then
  fail "failed after $SECONDS s: $(printf '%s; ' "${failed[@]}")"
fi
say "everything passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
