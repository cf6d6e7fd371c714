"""Where the fields of wire format v1 are: the tables of `docs/wire-format.md` as constants of the second codec."""

from __future__ import annotations

import struct

from hetkv.kv.dtypes import DType
from hetkv.reference.messages import Type

MAGIC = b"HKV1"
MAJOR, MINOR = 1, 5
FRAME_BYTES = 144
"""A whole frame message; in a file, the header before each payload."""
CHECKSUM_KEY = b"hetkv.checksum.1"
"""Public key of `checksum_seed`."""

PRELUDE = struct.Struct("<4sBBHIIQ16sQ")
FRAME = struct.Struct("<HHIIIQQ4BBBH4IIIQQQ")
BUNDLE = struct.Struct("<IIII")
RECORD = struct.Struct("<16sQHHIIIQQ4BBBH4IQQQQ")
TICKET = struct.Struct("<II")
BOUND_TICKET = struct.Struct("<II16s")
RANGE = struct.Struct("<QQ")
LIST = struct.Struct("<II")
SLOT_GRANT = struct.Struct("<IIQQII")
SLOT_NAME = struct.Struct("<II")
DONE = struct.Struct("<QQ")
ABORT = struct.Struct("<II")
HEARTBEAT = struct.Struct("<Q")
MAC = struct.Struct("<Q")
MIN_BYTES = PRELUDE.size + MAC.size
SCALED = {dtype.code for dtype in DType if dtype.itemsize == 1 and dtype is not DType.UINT8}


# Smallest body of a type, and whether each body of the type has that size.
BODY_SIZES = {
    Type.FRAME: (FRAME.size, True),
    Type.BUNDLE: (BUNDLE.size, False),
    Type.TICKET: (TICKET.size, False),
    Type.GRANT: (LIST.size, False),
    Type.RELEASE: (LIST.size, False),
    Type.RECALL: (LIST.size, False),
    Type.DONE: (DONE.size, True),
    Type.ABORT: (ABORT.size, False),
    Type.WANT: (0, True),
    Type.HEARTBEAT: (HEARTBEAT.size, True),
    Type.BYE: (0, True),
    Type.HOST_ONLY: (0, True),
    Type.BOUND_TICKET: (BOUND_TICKET.size, False),
}
OF_REQUEST = {Type.FRAME, Type.TICKET, Type.BOUND_TICKET, Type.DONE, Type.ABORT}
