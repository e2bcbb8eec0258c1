#!/usr/bin/env bash
# Makes the environment and checks everything: style, types, imports, tests.
#
#   ./scripts/test.sh              all but the exhaustive tests; what continuous integration runs
#   ./scripts/test.sh --all        every test; before a release
#   ./scripts/test.sh --fast       all but the slow and the exhaustive ones
#   ./scripts/test.sh tests/test_cli.py -k help     further arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
cd "$ROOT"

chosen="not exhaustive"
case "${1:-}" in
  --all) chosen="" && shift ;;
  --fast) chosen="not slow and not exhaustive" && shift ;;
esac

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

# Files are given to the workers in the order of tests/conftest.py: those that take longest first.
check "pytest" "$python" -m pytest --numprocesses="${FLIX_TEST_WORKERS:-2}" --dist=loadfile \
  --no-loadscope-reorder --durations=20 -m "$chosen" "$@"

if ((${#failed[@]})); then
  fail "failed after $SECONDS s: $(printf '%s; ' "${failed[@]}")"
fi
say "everything passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
