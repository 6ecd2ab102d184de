"""Philox4x32-10, a counter-based random generator, vectorised over counters.

Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*. A random number is a function of (key, counter)
and of nothing else, so that what happens to a sample does not depend on who draws it, when, or after what.
Written out here, rather than taken from NumPy, because NumPy neither vectorises over counters nor promises its
streams for ever. Known-answer vectors are in the tests.
"""

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox(key: int, counters: tuple[U64 | int, U64 | int, U64 | int, U64 | int]) -> tuple[U64, U64, U64, U64]:
    """Four random 32-bit words for each counter.

    Args:
        key: 64 bits.
        counters: four broadcastable words, each below 2**32.

    Returns:
        four uint64 arrays of the broadcast shape, each value below 2**32.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counters))
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (p1 >> _32) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _32) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(key: int, epochs: U64 | int, ids: U64, purpose: int) -> NDArray[np.float64]:
    """Four uniform numbers in [0, 1) for each (epoch, sample id), shape [n, 4], float64.

    `purpose` (below 2**16) separates the uses: numbers drawn for one never depend on another having been drawn.
    Epochs may reach 2**16, sample ids 2**48.
    """
    ids = np.asarray(ids, dtype=np.uint64)
    words = philox(key, (ids & _LOW, ids >> _32, np.asarray(epochs, dtype=np.uint64), purpose))
    return np.stack(words, axis=-1).astype(np.float64) * 2.0**-32


def mix64(x: U64) -> U64:
    """A bijective hash of 64-bit words: the finaliser of splitmix64 (Steele et al. 2014). Products wrap on purpose."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
