"""The NBD wire: numbers, layouts and limits that server and client share (fixed newstyle, all integers big-endian).

Layout of the parts spelled out by the structs below::

    greeting       server → client  magic u64, IHAVEOPT u64, flags u16; answered with client flags u32
    option         client → server  IHAVEOPT u64, option u32, length u32, data
    option reply   server → client  magic u64, option u32, reply u32, length u32, data
    request        client → server  magic u32, flags u16, command u16, cookie u64, offset u64, length u32, data (WRITE)
    simple reply   server → client  magic u32, error u32, cookie u64, data (READ)
    chunk          server → client  magic u32, flags u16, type u16, cookie u64, length u32, payload

Reference: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from struct import Struct
from typing import Final, Literal

from dr_cloud.nbd.export import Extent

# Handshake -----------------------------------------------------------------------------------------
NBD_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

GREETING: Final = Struct(">QQH")
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")
OPTION_REPLY: Final = Struct(">QIII")
EXPORT_NAME_REPLY: Final = Struct(">QH")
EXPORT_NAME_ZEROES: Final = bytes(124)

OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR_BIT: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR_BIT + 1
REP_ERR_POLICY: Final = REP_ERROR_BIT + 2
REP_ERR_INVALID: Final = REP_ERROR_BIT + 3
REP_ERR_TLS_REQD: Final = REP_ERROR_BIT + 5
REP_ERR_UNKNOWN: Final = REP_ERROR_BIT + 6
REP_ERR_TOO_BIG: Final = REP_ERROR_BIT + 9

INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3

INFO_EXPORT_BODY: Final = Struct(">HQH")
INFO_BLOCK_SIZE_BODY: Final = Struct(">HIII")
U16: Final = Struct(">H")
U32: Final = Struct(">I")

BASE_ALLOCATION: Final = "base:allocation"
BASE_ALLOCATION_ID: Final = 1

# Transmission flags of an export -------------------------------------------------------------------
HAS_FLAGS: Final = 1 << 0
READ_ONLY: Final = 1 << 1
SEND_FLUSH: Final = 1 << 2
SEND_FUA: Final = 1 << 3
SEND_TRIM: Final = 1 << 5
SEND_WRITE_ZEROES: Final = 1 << 6
SEND_DF: Final = 1 << 7
CAN_MULTI_CONN: Final = 1 << 8
SEND_FAST_ZERO: Final = 1 << 11

# Transmission --------------------------------------------------------------------------------------
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

REQUEST: Final = Struct(">IHHQQI")
SIMPLE_REPLY: Final = Struct(">IIQ")
CHUNK: Final = Struct(">IHHQI")
READ_CHUNK: Final = Struct(">IHHQIQ")
"""A chunk's head and the offset that begins the payload of OFFSET_DATA."""
ERROR_BODY: Final = Struct(">IH")
EXTENT: Final = Struct(">II")

CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISCONNECT: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

CHUNK_DONE: Final = 1 << 0
CHUNK_NONE: Final = 0
CHUNK_OFFSET_DATA: Final = 1
CHUNK_OFFSET_HOLE: Final = 2
CHUNK_BLOCK_STATUS: Final = 5
CHUNK_ERROR_BIT: Final = 1 << 15
CHUNK_ERROR: Final = CHUNK_ERROR_BIT + 1
CHUNK_ERROR_OFFSET: Final = CHUNK_ERROR_BIT + 2

STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

# Limits: every length that a peer sends is checked against one of these before anything is kept ----
PAYLOAD_BYTES_MAX: Final = 32 << 20
OPTION_BYTES_MAX: Final = 64 << 10
NAME_BYTES_MAX: Final = 4096
CONTEXT_QUERIES_MAX: Final = 128
EXTENTS_MAX: Final = 16 << 10
ERROR_TEXT_BYTES_MAX: Final = 512
DEFAULT_PORT: Final = 10809

ERRORS_SENT: Final = frozenset({errno.EIO, errno.ENOSPC, errno.EPERM, errno.EINVAL, errno.ESHUTDOWN})
"""NBD's error numbers are Linux's. Those an export may raise; any other becomes EIO."""
ERRORS_RECEIVED: Final = ERRORS_SENT | {errno.ENOMEM, errno.EOVERFLOW, errno.EOPNOTSUPP}


class Upgrade(Enum):
    """The step of a handshake that is not bytes."""

    START_TLS = "start-tls"


START_TLS: Final = Upgrade.START_TLS
Step = int | bytes | Literal[Upgrade.START_TLS]
"""What a handshake without I/O yields: a number of bytes that it wants, bytes to send, or START_TLS."""


def error_from_wire(number: int, text: str = "") -> OSError:
    """Make the `OSError` that a server's error number stands for (EIO if it is none of NBD's)."""
    code = number if number in ERRORS_RECEIVED else errno.EIO
    return OSError(code, text or os.strerror(code))


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """Pack one answer to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def pack_extents(extents: list[Extent]) -> bytes:
    """Pack the runs of a block-status chunk of base:allocation."""
    pack = EXTENT.pack
    return b"".join([pack(extent.length, STATE_HOLE | STATE_ZERO if extent.hole else 0) for extent in extents])


def clip_extents(extents: list[Extent], length: int, one: bool) -> list[Extent]:
    """Join neighbours of one kind, cut at `length` bytes and at the count that one chunk may carry.

    Args:
        extents: What the export answered, from the requested offset on.
        length: The requested length in bytes.
        one: Only the first run is wanted.

    Raises:
        ValueError: The extents cover no byte.
    """
    runs: list[Extent] = []
    left = length
    for extent in extents:
        size = min(extent.length, left)
        if size <= 0:
            continue
        left -= size
        if runs and runs[-1].hole == extent.hole:
            runs[-1] = Extent(runs[-1].length + size, extent.hole)
        elif runs and (one or len(runs) == EXTENTS_MAX):
            break
        else:
            runs.append(Extent(size, extent.hole))
    if not runs:
        raise ValueError("block status covers no byte")
    return runs
