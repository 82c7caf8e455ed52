"""Memory that was freed stays with the process, so that it need not be mapped and zeroed again.

A tap and a VDSA take and let go of buffers of up to a MiB or two, hundreds of times a second. By default glibc gives
each back to the kernel, and touching the next one costs a page fault per 4 KiB: on a virtual machine more than hashing
the data.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_MMAP_BYTES_MIN: Final = 32 << 20
_KEPT_BYTES_MAX: Final = 256 << 20
_ARENAS_MAX: Final = 2


def keep_freed_memory() -> bool:
    """Tell the C library to keep up to 256 MiB of freed memory; False where it has no such setting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = {
        _M_MMAP_THRESHOLD: _MMAP_BYTES_MIN,
        _M_TRIM_THRESHOLD: _KEPT_BYTES_MAX,
        _M_ARENA_MAX: _ARENAS_MAX,
    }
    return all(mallopt(setting, value) for setting, value in settings.items())
