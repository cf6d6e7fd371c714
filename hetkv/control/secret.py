"""The secret that instances share: from a file, or made once for this user on this host."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from ipaddress import ip_address
from pathlib import Path

from hetkv.control.handshake import MIN_SECRET_BYTES
from hetkv.errors import InputError

SECRET_ENV = "HETKV_SECRET_FILE"


def shared_secret(file: str | os.PathLike[str] | None = None) -> bytes:
    """The secret in `file`, else in the file that `$HETKV_SECRET_FILE` names, else this user's own on this host.

    Raises `InputError` where the file cannot be read, others can use it, or it is too short.
    """
    named = file or os.environ.get(SECRET_ENV)
    path = Path(named) if named else _own_file()
    try:
        mode = path.stat().st_mode
        data = path.read_bytes().strip()
    except OSError as error:
        raise InputError(f"secret file {path}: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"secret file {path} can be used by others: chmod 600 it")
    if len(data) < MIN_SECRET_BYTES:
        raise InputError(f"secret file {path} has {len(data)} bytes, {MIN_SECRET_BYTES} or more are needed")
    return data


def is_named() -> bool:
    """Whether the environment names the file, so that other hosts can have it too."""
    return bool(os.environ.get(SECRET_ENV))


def is_loopback(host: str) -> bool:
    """Whether an address or name means this host alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _own_file() -> Path:
    """`~/.cache/hetkv/secret`, made at the first use; of several processes that make it at once one wins."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetkv"
    path = folder / "secret"
    if path.exists():
        return path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(name, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(name)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; name a secret file in {SECRET_ENV}") from None
    return path
