"""Text files of users: UTF-8, or one error that names the file."""

from __future__ import annotations

from pathlib import Path

from hetkv.errors import InputError


def read_utf8(path: str | Path) -> str:
    """The text of a file, without a byte order mark. Raises `InputError` where it is no UTF-8, `OSError` as `open`."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})") from None
