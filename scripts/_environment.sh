# Sourced by the other scripts: makes the project's own environment in .venv.
#
#   ensure_environment          what a run needs
#   ensure_environment test     and what the tests need
#
# Needs a Python of 3.11 or newer and nothing else. Quick when nothing has changed; safe to
# interrupt and to run again, also at the same time from two terminals. FLIX_PYTHON names another
# Python to start from.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
OVERRIDES="$ROOT/scripts/overrides.txt"

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# A Python that is new enough, can make environments and is really there (not only a shim of it).
find_python() {
  local candidate
  for candidate in ${FLIX_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
    if "$candidate" -c '
import sys, venv, ensurepip
sys.exit(not sys.version_info >= (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python of 3.11 or newer that can make environments was found${FLIX_PYTHON:+ (FLIX_PYTHON=$FLIX_PYTHON)};" \
    "install one (with its venv module: on Debian and Ubuntu, python3.11 and python3.11-venv)"
}

# What the installation depends on; another folder makes another environment.
fingerprint() {
  "$VENV/bin/python" - "$ROOT" "$@" <<'PY'
import hashlib, pathlib, sys
root, *extras = sys.argv[1:]
digest = hashlib.sha256(repr((sys.version, root, extras)).encode())
for name in ("setup.py", "scripts/overrides.txt", "scripts/_environment.sh"):
    digest.update(pathlib.Path(root, name).read_bytes())
print(digest.hexdigest())
PY
}

install() {
  local target="$ROOT${1:+[$1]}" again=()
  # An installation that was interrupted may have left packages in halves.
  if [[ -e "$VENV/.installing" ]]; then again=(--reinstall); fi
  touch "$VENV/.installing"

  if "$VENV/bin/python" -m uv --version >/dev/null 2>&1 ||
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.5'; then
    # TensorFlow only reads and evaluates data here: on Linux its CPU package, half the size,
    # takes the place of the full one (unless that is there already: they share their files).
    local tensorflow=() full='import importlib.metadata; importlib.metadata.version("tensorflow")'
    if [[ "$(uname -sm)" == "Linux x86_64" ]] && ! "$VENV/bin/python" -c "$full" 2>/dev/null; then
      tensorflow=(--override "$OVERRIDES" 'tensorflow-text[tensorflow-cpu]')
    fi
    if "$VENV/bin/python" -m uv pip install --python "$VENV/bin/python" --compile-bytecode \
      ${again[@]+"${again[@]}"} --editable "$target" ${tensorflow[@]+"${tensorflow[@]}"}; then
      rm "$VENV/.installing"
      return
    fi
    say "uv did not succeed; trying pip"
  else
    say "uv cannot be installed; using pip"
  fi
  "$VENV/bin/python" -m pip install --disable-pip-version-check \
    ${again[@]+--force-reinstall} --editable "$target" || return 1
  rm "$VENV/.installing"
}

ensure_environment() {
  local extras="${1:-}" lock="$ROOT/.venv.lock"
  if command -v flock >/dev/null; then
    exec 9>"$lock"
    flock --nonblock 9 || { say "waiting for another set-up to finish"; flock 9; }
  fi
  local usable='import sys, pip; sys.exit(not sys.version_info >= (3, 11))'
  if [[ -e "$VENV" ]] && ! "$VENV/bin/python" -c "$usable" >/dev/null 2>&1; then
    say "the environment in .venv does not work; making it anew"
    rm -rf "$VENV"
  fi
  if [[ ! -e "$VENV" ]]; then
    local python
    python="$(find_python)"
    say "making .venv with $("$python" --version) ($python)"
    "$python" -m venv "$VENV"
  fi
  # The test environment serves for runs too.
  local wanted stamp="$VENV/.flix-${extras:-run}"
  wanted="$(fingerprint "$extras")"
  if [[ ! -e "$VENV/.installing" ]]; then
    if [[ "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
      exec 9>&-
      return
    fi
    if [[ -z "$extras" && "$(cat "$VENV/.flix-test" 2>/dev/null)" == "$(fingerprint test)" ]]; then
      exec 9>&-
      return
    fi
  fi
  say "installing flix_jax${extras:+ with what '$extras' needs}"
  install "$extras" || fail "the installation failed; run the script again to go on"
  printf '%s\n' "$wanted" > "$stamp"
  exec 9>&-
  say "the environment is ready ($SECONDS s)"
}
