"""Golden and malformed parts of codes of four bits, for `int4_parts.json`.

python tests/vectors/int4_parts.py [FOLDER]
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

INT4 = 3


def packed(*blocks: bytes, tail: bytes = b"", values: int = INT4, zeros: bytes = bytes(3), plain: int = 0) -> bytes:
    """A part of blocks of 32 bytes, which are packed, and of 64, which are not."""
    bits = sum(1 << at for at, block in enumerate(blocks) if len(block) == 32)
    size = plain or 64 * len(blocks) + len(tail)
    head = struct.pack("<IB3s", size, values, zeros) + bits.to_bytes(-(-len(blocks) // 8), "little")
    return head + b"".join(blocks) + tail


CODES = bytes(code & 255 for code in range(-8, 8)) * 4
"""All sixteen, four times."""
HALF = bytes((CODES[at] & 15) | (CODES[at + 32] & 15) << 4 for at in range(32))
SCALES = np.arange(1, 17, dtype="<f4").tobytes()


def good() -> dict[str, tuple[str, bytes, bytes]]:
    """What each is of, its plain bytes and the part."""
    mixed, tail = CODES + SCALES + CODES, b"\x01\x02\x03\x04\x05\x80"
    return {
        "codes": ("four blocks of all codes", CODES * 4, packed(HALF, HALF, HALF, HALF)),
        "scales": ("codes, a block of scales, codes", mixed, packed(HALF, SCALES, HALF)),
        "tail": ("two blocks and 6 bytes", CODES * 2 + tail, packed(HALF, HALF, tail=tail)),
        "nine": ("nine blocks, whose bits are two bytes", bytes(576), packed(*[bytes(32)] * 9)),
    }  # fmt: skip


def bad() -> dict[str, tuple[str, bytes, str]]:
    """What is wrong, the part, and a piece of the error's text."""
    whole = packed(HALF, HALF, HALF)
    wrong = "does not decode to its 192 bytes"
    return {
        "short": ("7 bytes", whole[:7], "has 7 bytes"),
        "reserved": ("a reserved byte", packed(HALF, HALF, HALF, zeros=b"\0\1\0"), "a reserved byte"),
        "empty": ("no plain bytes", struct.pack("<IB3s", 0, INT4, bytes(3)), "claims 0 bytes"),
        "odd": ("an odd number of them", packed(HALF, tail=b"\1\2\3"), "claims 67 bytes"),
        "too-many": ("over the limit", packed(HALF, plain=262146), "claims 262146 bytes"),
        "most": ("all that a field can say", packed(HALF, plain=2**32 - 2), f"claims {2**32 - 2} bytes"),
        "not-smaller": ("no block is packed", packed(CODES), "of 64 bytes has 73"),
        "no-bits": ("the header alone", whole[:8], wrong),
        "cut": ("a byte is missing", whole[:-1], wrong),
        "trailing": ("a byte follows", whole + b"\0", wrong),
        "bit-too-many": ("a bit of a block that is not there", whole[:8] + b"\x0f" + whole[9:], wrong),
        "bit-missing": ("a packed block without its bit", whole[:8] + b"\x05" + whole[9:], wrong),
    }


def main(folder: Path) -> None:
    """Writes the file."""
    made = {
        "good": {name: {"about": about, "plain": plain.hex(), "coded": coded.hex()}
                 for name, (about, plain, coded) in good().items()},
        "bad": {name: {"about": about, "coded": coded.hex(), "text": text}
                for name, (about, coded, text) in bad().items()},
    }  # fmt: skip
    (folder / "int4_parts.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
