"""The random stream of one image: a counter-based generator written out, so that no library can change it.

The compiled code that calls it does not see edits to this file: after one, delete `__pycache__`.
"""

# mypy sees numba's decorator as untyped: the compiler, not mypy, checks the types in here.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from math import sqrt

import numpy as np
from numba import njit

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)
_ULP = 2.0**-53


@njit(nogil=True)
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> _S30)) * _MIX1
    z = (z ^ (z >> _S27)) * _MIX2
    return z ^ (z >> _S31)


@njit(nogil=True)
def start(state, key, index):  # type: ignore[no-untyped-def]
    """Begin the stream of one image; the map from index to `state[0]` is one to one for a given key."""
    state[0] = _mix(key[0] + (np.uint64(index) + np.uint64(1)) * _GOLDEN)
    state[1] = _mix(key[1] ^ state[0])
    state[2] = np.uint64(0)


@njit(nogil=True)
def uniform(state):  # type: ignore[no-untyped-def]
    """Return the next number in [0, 1): SplitMix64 on a counter, mixed twice with a 128-bit key."""
    state[2] += _GOLDEN
    return np.float64(_mix(_mix(state[0] + state[2]) ^ state[1]) >> _S11) * _ULP


@njit(nogil=True)
def direction(state):  # type: ignore[no-untyped-def]
    """Return a unit vector of uniform angle, without trigonometry."""
    while True:
        x = 2.0 * uniform(state) - 1.0
        y = 2.0 * uniform(state) - 1.0
        square = x * x + y * y
        if 0.01 < square <= 1.0:
            norm = sqrt(square)
            return x / norm, y / norm
