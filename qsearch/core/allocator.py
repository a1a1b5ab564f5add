"""glibc's malloc, told to keep the buffers of activations instead of giving each back at once.

A buffer over 128 KiB to 32 MiB (glibc's threshold moves) is a mapping of its own: the kernel clears
its pages on every use, 12 % of the time of a small U-Net's pass on one thread. Buffers over
`MAPPED` stay mappings, and so do weights, which are read from their files.
"""

from __future__ import annotations

import ctypes
import os
import sys

MAPPED = 64 << 20  #: bytes from which a buffer is a mapping of its own
KEPT = 256 << 20  #: free bytes at the heap's end from which they go back to the system
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_buffers() -> bool:
    """Set glibc's thresholds for this process; whether that was done.

    False with another C library, and where the environment sets them (`MALLOC_...`,
    `GLIBC_TUNABLES`).
    """
    asked = any(n.startswith("MALLOC_") or n == "GLIBC_TUNABLES" for n in os.environ)
    if asked or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 - raises elsewhere
    except (OSError, AttributeError):
        return False
    # before glibc 2.35 a threshold is at most 32 MiB
    mapped = mallopt(_MMAP_THRESHOLD, MAPPED) or mallopt(_MMAP_THRESHOLD, 32 << 20)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, KEPT))
