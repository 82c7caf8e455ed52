"""What a client may send to an export: told to it in the handshake, checked for every request."""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from dr_cloud.nbd import protocol as p
from dr_cloud.nbd.export import Export

_FLAGS_TAKEN: Final = {
    p.CMD_READ: p.CMD_FLAG_FUA | p.CMD_FLAG_DF,
    p.CMD_WRITE: p.CMD_FLAG_FUA,
    p.CMD_FLUSH: p.CMD_FLAG_FUA,
    p.CMD_TRIM: p.CMD_FLAG_FUA,
    p.CMD_WRITE_ZEROES: p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE | p.CMD_FLAG_FAST_ZERO,
    p.CMD_BLOCK_STATUS: p.CMD_FLAG_FUA | p.CMD_FLAG_REQ_ONE,
}
_CHANGES: Final = frozenset({p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES})


class Selected(NamedTuple):
    """What the client chose."""

    export: Export
    structured: bool
    contexts: bool
    """base:allocation was negotiated."""


def transmission_flags(export: Export, structured: bool) -> int:
    """Tell what the client may send to this export."""
    flags = p.HAS_FLAGS | p.SEND_FLUSH | p.CAN_MULTI_CONN
    if structured:
        flags |= p.SEND_DF
    if export.read_only:
        return flags | p.READ_ONLY
    flags |= p.SEND_FUA | p.SEND_TRIM | p.SEND_WRITE_ZEROES
    return flags | p.SEND_FAST_ZERO if _has_fast_zeroes(export) else flags


def refusal(selected: Selected, command: int, flags: int, offset: int, length: int) -> int:
    """Return the error number for a request that the export must not see, or 0."""
    export = selected.export
    taken = _FLAGS_TAKEN.get(command)
    if taken is None or flags & ~taken:
        return errno.EINVAL
    if flags & p.CMD_FLAG_DF and command == p.CMD_READ and not selected.structured:
        return errno.EINVAL
    if command == p.CMD_BLOCK_STATUS and not selected.contexts:
        return errno.EINVAL
    if command == p.CMD_FLUSH:
        return errno.EINVAL if offset or length else 0
    if command in _CHANGES and export.read_only:
        return errno.EPERM
    if offset + length > export.size_bytes:
        return errno.ENOSPC if command in (p.CMD_WRITE, p.CMD_WRITE_ZEROES) else errno.EINVAL
    if not length or (offset | length) & (export.block_size_minimum - 1):
        return errno.EINVAL
    if command == p.CMD_READ and length > p.PAYLOAD_BYTES_MAX:
        return errno.EINVAL
    if flags & p.CMD_FLAG_FAST_ZERO and command == p.CMD_WRITE_ZEROES and not _has_fast_zeroes(export):
        return errno.EOPNOTSUPP
    return 0


def _has_fast_zeroes(export: Export) -> bool:
    """Tell whether an export says that its `write_zeroes` is never slower than writing (see `Export`)."""
    return bool(getattr(export, "fast_zeroes", False))
