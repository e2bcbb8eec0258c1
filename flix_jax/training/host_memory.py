"""Memory of the host where the host is the device."""

import ctypes
import platform

# glibc's <malloc.h>
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Lets the process keep memory that it frees, where the C library is glibc.

    XLA's CPU backend allocates the temporary memory of a program anew for every call. glibc returns
    blocks of such a size to the kernel, and a step then spends a fifth of its time on page faults.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, _MOST)
    libc.mallopt(_ARENA_MAX, 1)
