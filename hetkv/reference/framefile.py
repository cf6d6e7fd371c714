"""Files of frames: header, payload, header, payload, as `docs/wire-format.md` defines the file form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import IO

import msgspec

from hetkv.errors import AuthenticationError, ChecksumError, HetkvError, InputError, MalformedError
from hetkv.reference.checksum import payload_checksum
from hetkv.reference.messages import Frame, Prelude, Type
from hetkv.reference.payload import payload_parts
from hetkv.reference.wire import FRAME_BYTES, checksum_seed, decode, encode

FILE_KEY = bytes(16)
"""MAC key of files without a secret key: the MAC then only guards against faults."""
_CHUNK_BYTES = 1 << 24


class FrameWriter:
    """Writes frames to a binary file that the caller opens, owns and closes. Sequence numbers start at 0."""

    def __init__(self, file: IO[bytes], key: bytes = FILE_KEY) -> None:
        self._file = file
        self._key = key
        self._sequence = 0

    def write(self, request_id: bytes, epoch: int, frame: Frame, parts: Mapping[int, bytes]) -> Frame:
        """Appends `frame` with one part a segment, each `[head][token][channel]` in C order.

        Fills in `payload_length` and `checksum` and returns the frame as written. Raises `InputError` where a part is
        not as long as the frame says.
        """
        payload = bytearray()
        for segment, _, size in payload_parts(frame):
            part = parts.get(segment, b"")
            if len(part) != size:
                raise InputError(f"segment {segment} has {len(part)} bytes; the frame makes it {size}")
            payload += part + bytes(-size % 8)
        prelude = Prelude(Type.FRAME, self._sequence, request_id, epoch)
        checksum = payload_checksum(payload, checksum_seed(prelude, frame))
        frame = msgspec.structs.replace(frame, payload_length=len(payload), checksum=checksum)
        self._file.write(encode(prelude, frame, self._key))
        self._file.write(payload)
        self._sequence += 1
        return frame


def read_frames(file: IO[bytes], key: bytes = FILE_KEY) -> Iterator[tuple[Prelude, Frame, bytes]]:
    """Each frame of a binary file with its verified payload, in order.

    Raises `MalformedError`, `UnsupportedError`, `AuthenticationError` (MAC or sequence) or `ChecksumError`; the text
    starts with the number and the byte offset of the frame. Memory is bounded by the file, whatever a header says.
    """
    offset = 0
    number = 0
    while header := file.read(FRAME_BYTES):
        try:
            prelude, frame = _decode_header(header, number, key)
            payload = _read_payload(file, frame.payload_length)
            found = payload_checksum(payload, checksum_seed(prelude, frame))
            if found != frame.checksum:
                raise ChecksumError(f"payload has the checksum {found:#018x}, its header says {frame.checksum:#018x}")
        except HetkvError as error:
            raise type(error)(f"frame {number} at byte {offset}: {error}") from None
        yield prelude, frame, payload
        offset += FRAME_BYTES + len(payload)
        number += 1


def split_payload(frame: Frame, payload: bytes) -> dict[int, bytes]:
    """The parts of a frame's payload by segment, without the zeros between them."""
    return {segment: payload[offset : offset + size] for segment, offset, size in payload_parts(frame)}


def _decode_header(header: bytes, number: int, key: bytes) -> tuple[Prelude, Frame]:
    if len(header) < FRAME_BYTES:
        raise MalformedError(f"header is cut short: {len(header)} of {FRAME_BYTES} bytes")
    prelude, body = decode(header, key)
    if not isinstance(body, Frame):
        raise MalformedError(f"message is a {prelude.type.text}; a file holds frames alone")
    if prelude.sequence != number:
        raise AuthenticationError(f"sequence is {prelude.sequence}, not {number}")
    return prelude, body


def _read_payload(file: IO[bytes], length: int) -> bytes:
    payload = bytearray()
    while len(payload) < length:
        chunk = file.read(min(_CHUNK_BYTES, length - len(payload)))
        if not chunk:
            raise MalformedError(f"payload is cut short: {len(payload)} of {length} bytes")
        payload += chunk
    return bytes(payload)
