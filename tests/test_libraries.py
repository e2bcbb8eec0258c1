"""What TensorFlow's native libraries log while it is imported stays out of standard error."""

import subprocess
import sys

import pytest

BANNER = (
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    "I0000 00:00:1700000000.277367   30002 stub.cc:31] Could not find drivers on your machine.\n"
    "E0000 00:00:1700000000.294173   30002 driver.cc:31] no device\n"
)
FATAL = "F0000 00:00:1700000000.294173   30002 cpu.cc:31] this machine lacks instructions\n"


def written(inside, after=""):
    """Standard error and exit status of a process that writes so while it is held back."""
    code = f"""
import os, sys
from flix_jax.data.libraries import native_log_left_out
with native_log_left_out():
{inside}
{after}
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    return done.stderr, done.returncode


def test_banners_are_left_out_and_all_else_passes_in_order():
    inside = f"""
    os.write(2, {BANNER!r}.encode())
    print("I see", file=sys.stderr)
    os.write(2, {FATAL!r}.encode())
    os.write(2, b"no end of line")
"""
    after = f"print(file=sys.stderr)\nos.write(2, {BANNER!r}.encode())"
    assert written(inside, after) == (f"I see\n{FATAL}no end of line\n\n{BANNER}", 0)


def test_an_error_inside_is_raised_and_told():
    told, status = written("    raise ValueError('wrong')")
    assert status == 1 and told.endswith("ValueError: wrong\n")


def test_what_was_written_before_the_process_ends_inside_is_told():
    assert written(f"    os.write(2, {FATAL!r}.encode())\n    os._exit(7)") == (FATAL, 7)


@pytest.mark.parametrize(
    "before", ["os.environ['PATH'] = ''", "os.close(2)"], ids=["no grep", "no standard error"]
)
def test_without_its_means_nothing_is_left_out(before):
    code = f"""
import os
{before}
from flix_jax.data.libraries import native_log_left_out
with native_log_left_out():
    os.write(1, b"ran")
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert done.stdout == b"ran" and done.returncode == 0
