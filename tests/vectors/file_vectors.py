"""Files of frames, golden and malformed."""

from __future__ import annotations

import io

from bad_vectors import Bad
from good_vectors import EPOCH, REQUEST, frame

from hetkv.kv.dtypes import DType
from hetkv.reference import messages as m
from hetkv.reference.framefile import FrameWriter
from hetkv.reference.payload import payload_parts
from hetkv.reference.wire import encode


def pattern(size: int, start: int) -> bytes:
    """Bytes without a short period, to stand for KV data."""
    return bytes((start + 7 * i + (i >> 8) * 13) & 0xFF for i in range(size))


def frame_file() -> tuple[bytes, list[m.Frame]]:
    """A file of three frames: K and V, an MLA record with padding, a state."""
    file = io.BytesIO()
    writer = FrameWriter(file)
    frames = []
    mixed = frame([DType.FLOAT8_E4M3FN, DType.FLOAT32, DType.BFLOAT16], [511, 3, 63], heads=1, tokens=3)
    for number, shape in enumerate((frame([DType.BFLOAT16] * 2, [64, 64]), mixed, frame([DType.UINT8], [1001]))):
        parts = {segment: pattern(size, 31 * number + segment) for segment, _, size in payload_parts(shape)}
        frames.append(writer.write(REQUEST, EPOCH, shape, parts))
    return file.getvalue(), frames


def bad_files(good: bytes, frames: list[m.Frame]) -> dict[str, Bad]:
    """Broken copies of the golden file."""
    first, second = 144 + frames[0].payload_length, 144 + frames[1].payload_length
    at = 144 + 16
    swapped = good[:at] + good[at + 8 : at + 16] + good[at : at + 8] + good[at + 16 :]
    moved = good[:144] + good[152:first] + good[144:152] + good[first:]
    first_payload = good[144 : 144 + frames[1].payload_length]
    return {
        "cut-header": Bad("ends in a header", good[: first + 100], "MalformedError", "header is cut short: 100 of 144"),
        "cut-payload": Bad(
            "ends in a payload", good[: first - 1], "MalformedError", "payload is cut short: 2559 of 2560"
        ),
        "bit-flip": Bad(
            "one bit of a payload",
            good[:200] + bytes([good[200] ^ 4]) + good[201:],
            "ChecksumError",
            "frame 0 at byte 0",
        ),
        "swapped-words": Bad("two words change places", swapped, "ChecksumError", "payload has the checksum"),
        "rotated": Bad("all words move by one", moved, "ChecksumError", "payload has the checksum"),
        "zeroed-word": Bad(
            "a word is zero", good[:at] + bytes(8) + good[at + 8 :], "ChecksumError", "payload has the checksum"
        ),
        "foreign-payload": Bad(
            "another frame's payload",
            good[: first + 144] + first_payload + good[first + second :],
            "ChecksumError",
            f"frame 1 at byte {first}",
        ),
        "missing-frame": Bad(
            "frame 1 is gone", good[:first] + good[first + second :], "AuthenticationError", "is 2, not 1"
        ),
        "message-inside": Bad(
            "a heartbeat in a file",
            encode(m.Prelude(m.Type.HEARTBEAT), m.Heartbeat(1), bytes(16)) + good,
            "MalformedError",
            "frame 0 at byte 0: length is 64, but 144 bytes arrived",
        ),
    }
