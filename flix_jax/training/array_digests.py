"""Digests of arrays, computed where they lie: the same on any mesh, and no array leaves its device.

Every element's bits are mixed with its place by a function that is one to one in the bits, and the
results are summed modulo 2**32, plainly and times an odd number of the place. A change of a single
element always changes both sums; of others a sum misses one in 2**14 at worst (two signs flipped),
both together none that was ever seen. This guards against damage, not against an adversary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flix_jax.adapters.tree import leaves_by_name

_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: it spreads places over all bits
_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}

Digests = dict[str, tuple[jax.Array, jax.Array]]
"""Leaf name -> the two halves of its digest, uint32 scalars that may be still computed."""


def of(tree: Any) -> Digests:
    """Begins to compute the digest of every array of a tree, by the name of the leaf."""
    found: Digests = {}
    for name, leaf in leaves_by_name(tree):
        digest = _digest(leaf)
        if jax.default_backend() == "cpu" and len(leaf.sharding.device_set) > 1:
            # Collectives of programs that run at once would wait for each other's threads.
            jax.block_until_ready(digest)
        found[name] = digest
    return found


def texts(digests: Digests) -> dict[str, str]:
    """Waits for digests; 16 hexadecimal digits each."""
    found = jax.device_get(digests)
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in found.items()}


@jax.jit
def _digest(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = min(array.dtype.itemsize, 4)
    # Of 64 bits it makes a further axis of two halves.
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[width]).astype(jnp.uint32)
    place, stride = jnp.zeros(bits.shape, jnp.uint32), _GOLDEN
    for axis in reversed(range(bits.ndim)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place += steps * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = _mix(bits + place)
    sums = mixed, mixed * (place | 1)
    if bits.ndim > 1:  # first of each row, which a CPU's threads share, and both sums in one pass
        sums = jax.lax.optimization_barrier(_sums(sums, first_axis=1))
    return _sums(sums, first_axis=0)


def _sums(of: tuple[jax.Array, jax.Array], first_axis: int) -> tuple[jax.Array, jax.Array]:
    """Both summed over an axis and all behind it."""

    def add(x: Any, y: Any) -> Any:
        return x[0] + y[0], x[1] + y[1]

    zero = jnp.uint32(0)
    return jax.lax.reduce(of, (zero, zero), add, tuple(range(first_axis, of[0].ndim)))


def _mix(x: jax.Array) -> jax.Array:
    """The first half of MurmurHash3's finaliser, which is one to one over 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return x ^ (x >> 13)
