"""Golden and malformed coded parts: `coded_parts.json` is written once, as zstd's versions do not code alike.

python tests/vectors/coded_parts.py [FOLDER]
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

from hetkv.core import core


def good() -> dict[str, tuple[str, bytes, int]]:
    """What each is of, its plain bytes and its kind of values."""
    numbers = np.random.default_rng(1).standard_normal(512).astype(np.float32)
    bfloat16 = (numbers.view(np.uint32) >> 16).astype("<u2")
    special = np.resize(np.array([0x7FC0, 0xFFFF, 0x7F80, 0xFF80, 0x8000, 0, 1, 0x7F7F], "<u2"), 256)
    return {
        "bfloat16": ("512 bfloat16 values", bfloat16.tobytes(), 1),
        "float16": ("512 float16 values", numbers.astype("<f2").tobytes(), 2),
        "special": ("NaN, infinite, zeros, the smallest and the largest, as bfloat16", special.tobytes(), 1),
        "zeros": ("all zeros", bytes(4096), 2),
    }


def bad(coded: bytes) -> dict[str, tuple[str, bytes, str]]:
    """What is wrong, the part, and a piece of the error's text."""
    plain = struct.unpack_from("<I", coded)[0]
    stream = coded[8 + plain // 2 :]

    def head(length: int, values: int = 1, zeros: bytes = bytes(3)) -> bytes:
        return struct.pack("<IB3s", length, values, zeros) + coded[8:]

    wrong = f"does not decode to its {plain} bytes"
    return {
        "short": ("7 bytes", coded[:7], "has 7 bytes"),
        "values-none": ("values 0", head(plain, 0), "values of unknown kind 0"),
        "values-unknown": ("values 4", head(plain, 4), "values of unknown kind 4"),
        "reserved": ("a reserved byte", head(plain, 1, b"\0\0\1"), "a reserved byte"),
        "empty": ("no plain bytes", head(0), "claims 0 bytes"),
        "odd": ("an odd number of them", head(plain + 1), f"claims {plain + 1} bytes"),
        "too-many": ("over the limit", head(262146), "claims 262146 bytes"),
        "most": ("all that a field can say", head(2**32 - 2), f"claims {2**32 - 2} bytes"),
        "no-stream": ("nothing after the lower bytes", coded[: 8 + plain // 2], f"has {8 + plain // 2}"),
        "cut-lower": ("cut in the lower bytes", coded[:100], "has 100"),
        "not-smaller": ("as long as the plain bytes", coded + bytes(plain - len(coded)), f"has {plain}"),
        "cut-stream": ("the stream is cut", coded[:-1], wrong),
        "no-zstd": ("the stream is no zstd frame", coded[: -len(stream)] + b"\xaa" * len(stream), wrong),
        "more": ("the stream decodes to more", head(plain - 64), f"does not decode to its {plain - 64} bytes"),
        "less": ("the stream decodes to less", coded[: -len(stream)] + small(plain // 2 - 1), wrong),
        "trailing": ("a byte follows the stream", coded + b"\0", wrong),
    }


def small(length: int) -> bytes:
    """A zstd frame of so many zeros."""
    part = core.encode_part(np.zeros(2 * length, np.uint8), 2)
    assert part is not None
    return part[8 + length :]


def main(folder: Path) -> None:
    """Writes the file, with what the extension's coder makes of the golden parts."""
    made = {}
    for name, (about, plain, values) in good().items():
        coded = core.encode_part(np.frombuffer(plain, np.uint8).copy(), values)
        assert coded is not None
        made[name] = {"about": about, "plain": plain.hex(), "coded": coded.hex()}
    broken = {
        name: {"about": about, "coded": data.hex(), "text": text}
        for name, (about, data, text) in bad(bytes.fromhex(made["bfloat16"]["coded"])).items()
    }
    text = json.dumps({"good": made, "bad": broken}, indent=1) + "\n"
    (folder / "coded_parts.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
