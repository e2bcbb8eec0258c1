"""seqio and TensorFlow, for reading text alone. All of this package imports them from here.

What TensorFlow's libraries say of GPUs is left out: they say it in native code, before any setting
of theirs is heard, and it would stand before the one line of an error. The GPUs are hidden from it,
for it would take their memory.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# What absl's native log writes below its highest level, FATAL, and its note on where it goes.
_LOGGED = r"^(WARNING: All log messages before absl::InitializeLog|[IWE][0-9]{4} [0-9:.]+ )"


@contextlib.contextmanager
def native_log_left_out() -> Iterator[None]:
    """Leaves lines of absl's native log out of what reaches file descriptor 2.

    All else passes at once, in its order, also where the process ends inside: a process of its own
    reads it. Where there is no `grep`, or no standard error, nothing is left out.
    """
    command = ["grep", "--line-buffered", "-v", "-a", "-E", _LOGGED]
    try:
        told = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, told)
        try:
            # A session of its own: Ctrl-C is not for it.
            relay = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=told, start_new_session=True
            )
        except OSError:
            yield
            return
        assert relay.stdin is not None
        stack.callback(relay.wait)
        stack.callback(relay.stdin.close)
        stack.callback(os.dup2, told, 2)
        if sys.stderr is not None:
            sys.stderr.flush()
            stack.callback(sys.stderr.flush)
        os.dup2(relay.stdin.fileno(), 2)
        yield


with native_log_left_out():
    import seqio
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # its driver is asked now, and says what it lacks

__all__ = ["seqio", "tf"]
