"""Let the C library keep the memory that tensors give back, or return it at once."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt, malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors instead of returning it to the system and asking anew.

    A step allocates the same megabytes again and again; fetched from the system, each page is a fault and a page of
    zeros to write, which can take longer than the arithmetic. The process then holds on to the most it has used. The
    commands of `crbp` call this at their start; a program of your own may do so.

    Returns:
        Whether the C library is glibc, the only one that this is for; otherwise nothing is changed.
    """
    return _mallopt({_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26})


def return_freed_memory() -> bool:
    """Let this process return the memory of each tensor of 64 KiB or more at once, so that its size is what they take.

    For measuring memory: what is allocated and freed in another order otherwise leaves gaps of another size. Each such
    tensor then has pages of its own, fetched from the system anew, which is slow. Not for a process that has called
    `keep_freed_memory`, of whose other settings this undoes none.

    Returns:
        Whether the C library is glibc, the only one that this is for; otherwise nothing is changed.
    """
    return _mallopt({_MMAP_THRESHOLD: 2**16})


def _mallopt(settings: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    accepted = [library.mallopt(name, value) == 1 for name, value in settings.items()]
    return all(accepted)
