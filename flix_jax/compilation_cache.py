"""Where compiled programs are kept, so that the same command does not compile them again.

JAX writes each program that took more than a second to compile, by a digest of the program, its
options, the versions and the devices; what was cut off in the middle is compiled again, with a
warning. Here is decided where that is: apart for every kind of host, of which the digest knows
nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

NONE = "none"
VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MOST = 8 << 30  # bytes in a local folder; what was used least recently goes


def use(given: str | None) -> str | None:
    """Has JAX keep compiled programs, in this process and in those that it starts.

    Args:
      given: a folder, local or in a bucket; 'none' keeps none; None is the folder that the
        variable JAX_COMPILATION_CACHE_DIR names, or one in the user's cache.

    Returns:
      Why none are kept, where that was not asked for.

    Raises:
      ValueError: the folder that is given cannot be written, or is in another kind of bucket.
    """
    if given == NONE:
        _set("", -1)
        return None
    if given is None and VARIABLE in os.environ:
        return None
    if given is not None and "://" in given:
        from flix_jax import buckets  # and with it the clients

        buckets.check_installed(given)
        _set(f"{given.rstrip('/')}/{_host()}", -1)
        return None
    try:
        folder = _default() if given is None else Path(given)
        folder = folder / _host()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not yours to write")
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        reason = getattr(error, "strerror", None) or str(error)
        if given is not None:
            raise ValueError(f"--compilation_cache={given} cannot be written: {reason}") from error
        _set("", -1)
        return f"compiled programs are not kept for the next start: {reason}"
    _set(str(folder), MOST)
    return None


def _default() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "flix_jax" / "compiled"


def _set(folder: str, most: int) -> None:
    os.environ[VARIABLE] = folder
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(most)
    jax = sys.modules.get("jax")
    if jax is not None:  # which has read the variables
        jax.config.update("jax_compilation_cache_dir", folder or None)
        jax.config.update("jax_compilation_cache_max_size", most)


def _host() -> str:
    """A name for the instructions that the processor has: programs of a CPU are made of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    told = " ".join(sorted((known or [platform.processor()])[0].split()))
    return f"{platform.machine()}-{hashlib.blake2b(told.encode(), digest_size=4).hexdigest()}"
