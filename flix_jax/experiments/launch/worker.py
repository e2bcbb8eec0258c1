"""The script that workers run, in the launched folder: install, train, start, follow, stop."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flix_jax import preemption

CODE = "code.tar.gz"
SCRIPT = "worker.sh"
GIN = "gin"  # the folder of the gin files, where training is started

#: The status of `follow` and `lost` where training ended without telling how, and that of training
#: which was asked to stop: in both cases it goes on if it is started again.
LOST = preemption.STATUS

_TEMPLATE = """\
#!/usr/bin/env bash
# One worker of {name}. Usage: worker.sh install | train | start | follow | lost | stop
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

running() {{ ! flock --nonblock lock true; }}

case "${{1:-}}" in
  install) # an environment of its own, of the code that lies here
    if running; then
      echo "training runs here already and is left alone"
      exit 0
    fi
    mkdir -p code
    find code -mindepth 1 -maxdepth 1 ! -name '.venv*' -exec rm -rf {{}} +
    tar -xzf {code} -C code
    if ! python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      export PIP_BREAK_SYSTEM_PACKAGES=1 UV_PYTHON_PREFERENCE=only-managed
      python3 -m pip install --quiet uv
      python3 -m uv python install --quiet 3.11
      FLIX_PYTHON="$(python3 -m uv python find 3.11)"
      export FLIX_PYTHON
    fi
    # shellcheck source=/dev/null
    source code/scripts/_environment.sh
    ensure_environment {extra}
    ;;
  train)
    export FLIX_COMMIT={version}
    echo "flix_jax $FLIX_COMMIT on $(uname -n)"
    mkdir -p {gin} # a bucket keeps no empty folder
    cd {gin}
    exec ../code/.venv/bin/{train}
    ;;
  start) # train in the background, so that a lost connection does not end it
    if running; then
      echo "training runs here already"
      exit 0
    fi
    rm -f status
    nohup setsid flock lock bash {script} attempt < /dev/null >> log 2>&1 &
    echo $! > pid
    until [[ -e status ]] || running; do sleep 0.1; done
    ;;
  attempt)
    status=0
    bash {script} train || status=$?
    echo "$status" > status
    ;;
  follow) # ends as training ends; {lost} where it was killed, by a restart of the machine say, or
    # asked to stop
    if running; then
      tail -n 100 --pid="$(cat pid)" -F log
    else
      tail -n 100 log
    fi
    if [[ ! -e status ]]; then exit {lost}; fi
    exit "$(cat status)"
    ;;
  lost) # the status {lost} where training was killed or asked to stop
    if running; then exit 0; fi
    if [[ ! -e status || "$(cat status)" == {lost} ]]; then exit {lost}; fi
    ;;
  stop)
    if running; then kill -TERM -- "-$(cat pid)"; fi
    for _ in {{1..300}}; do
      if ! running; then exit 0; fi
      sleep 0.1
    done
    kill -KILL -- "-$(cat pid)"
    ;;
  *)
    echo "worker.sh: install, train, start, follow, lost or stop?" >&2
    exit 64
    ;;
esac
"""


def script(*, name: str, extra: str, version: str, train: Sequence[str]) -> str:
    """The text of the script.

    Args:
      name: of the launched job.
      extra: of the installation, as in `Job`.
      version: of the code.
      train: the command, 'flix' first, which is that of the installation.
    """
    return _TEMPLATE.format(
        name=name,
        code=CODE,
        script=SCRIPT,
        gin=GIN,
        extra=extra,
        version=version,
        train=shlex.join(train),
        lost=LOST,
    )
