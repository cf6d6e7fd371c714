"""Where files of frames are: a path, a URL that fsspec knows (`s3://`, `memory://`), or an open binary file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hetkv.errors import BuildError, InputError

Place = str | os.PathLike[str] | IO[bytes]


def name_of(place: Place) -> str:
    """What errors call it."""
    return os.fspath(place) if isinstance(place, str | os.PathLike) else str(getattr(place, "name", "the file"))


@contextmanager
def writing(place: Place, options: dict[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """The place, open for writing. It appears, or replaces what was there, whole at the end and not at all where the
    body raises; an open file of the caller's is only written to, from where it stands."""
    if not isinstance(place, str | os.PathLike):
        yield place
        return
    path = os.fspath(place)
    if not _is_url(path):
        part = Path(f"{path}.{secrets.token_hex(8)}.part")  # threads and hosts may write the same path at once
        try:
            with open(part, "xb") as file:
                yield file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return
    system, inner = _filesystem(path, options)
    file = system.open(inner, "wb", autocommit=False)
    try:
        yield file
        file.close()
    except BaseException:
        file.discard()
        raise
    file.commit()


@contextmanager
def reading(place: Place, options: dict[str, Any] | None = None) -> Iterator[IO[bytes]]:
    """The place, open for reading. Raises `InputError` where it is not there."""
    if not isinstance(place, str | os.PathLike):
        yield place
        return
    path = os.fspath(place)
    try:
        if _is_url(path):
            system, inner = _filesystem(path, options)
            file = system.open(inner, "rb")
        else:
            file = Path(path).open("rb")  # noqa: SIM115
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    with file:
        yield file


def _is_url(path: str) -> bool:
    return "://" in path or "::" in path


def _filesystem(path: str, options: dict[str, Any] | None) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise BuildError(f"{path}: URLs need fsspec: pip install 'hetkv[storage]', or 'hetkv[s3]' for s3://") from None
    try:
        system, inner = url_to_fs(path, **(options or {}))
    except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose package is missing
        raise InputError(f"{path}: {error}") from None
    return system, inner
