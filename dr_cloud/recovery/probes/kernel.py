"""The system calls that Python 3.11 does not offer: namespaces, mounts, paths that cannot leave a root."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from typing import Final

NEW_MOUNTS: Final = 0x00020000
NEW_UTS: Final = 0x04000000
NEW_IPC: Final = 0x08000000
NEW_PIDS: Final = 0x20000000
NEW_NETWORK: Final = 0x40000000

READ_ONLY: Final = 1
NO_SUID: Final = 2
NO_DEVICES: Final = 4
NO_EXEC: Final = 8
BIND: Final = 4096
PRIVATE_BELOW: Final = 16384 | 1 << 18
"""MS_REC | MS_PRIVATE: nothing mounted from now on is seen outside."""
SLAVE_BELOW: Final = 16384 | 1 << 19
"""MS_REC | MS_SLAVE: what is mounted outside from now on is seen, and not the other way round."""
SHARED: Final = 1 << 20

_DEATH_SIGNAL: Final = 1
_NO_NEW_PRIVILEGES: Final = 38
_OPENAT2: Final = 437
_RESOLVE_IN_ROOT: Final = 0x10
_RESOLVE_NO_MAGICLINKS: Final = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags`; a new process namespace begins with the next child."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount as the system call of that name does."""
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()), target)


def die_with_parent() -> None:
    """Be killed when the thread that started this process ends."""
    _check(_libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")


def gain_nothing() -> None:
    """No program started from here on gains privileges from its file."""
    _check(_libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")


def open_in_root(root: int, path: str, flags: int = os.O_RDONLY) -> int:
    """Open a path as if `root` were `/`: no symbolic link and no `..` leads out of it (openat2).

    Args:
        root: An open folder.
        path: Below it, with or without a leading slash.
        flags: As for `os.open`. A pipe or a device that lies there is not waited for.

    Raises:
        OSError: As `os.open` does.
    """
    # openat2 refuses flags that mean nothing: O_PATH opens nothing that could be waited for.
    flags |= os.O_CLOEXEC | (0 if flags & os.O_PATH else os.O_NONBLOCK | os.O_NOCTTY)
    how = ctypes.create_string_buffer(struct.pack("=QQQ", flags, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS), 24)
    name = ctypes.c_char_p(os.fsencode(path.lstrip("/") or "."))
    return _check(_libc.syscall(_OPENAT2, root, name, how, 24), path)
