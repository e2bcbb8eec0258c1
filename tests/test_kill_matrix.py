"""A sample of the matrix of kills: the whole of it is `benchmarks/kill_matrix.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill_matrix.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "kills"),
    [
        (1, 3),
        pytest.param(1, 6, marks=pytest.mark.exhaustive),
        pytest.param(2, 4, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(processes, kills, tmp_path):
    command = [sys.executable, str(SCRIPT), "--seed=0", f"--kills={kills}"]
    command += [f"--processes={processes}", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "verdict: all equal" in done.stdout and f"{kills} kills of 1 runs" in done.stdout
