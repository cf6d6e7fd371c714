"""The secret that instances share, and how it is replaced: from a file, or made once for this user on this host."""

from __future__ import annotations

import logging
import math
import os
import secrets
import stat
import tempfile
import threading
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol, runtime_checkable

from hetkv.control.handshake import MIN_SECRET_BYTES, check_secret
from hetkv.errors import InputError

SECRET_ENV = "HETKV_SECRET_FILE"
OLD = ".old"
"""A file of the name of the secret's with this at its end holds the secret before it, which is accepted, too."""
_log = logging.getLogger(__name__)


@runtime_checkable
class Secrets(Protocol):
    """What each handshake asks for the secret."""

    def accepted(self) -> tuple[bytes, ...]:
        """The secret, then those before it that are still accepted."""


class HeldSecret:
    """A secret that the caller gives. Any thread."""

    def __init__(self, secret: bytes) -> None:
        """Raises `InputError` where it is too short."""
        check_secret(secret)
        self._held: list[tuple[bytes, float]] = [(bytes(secret), math.inf)]
        self._lock = threading.Lock()

    def rotate(self, secret: bytes, accept_old_s: float) -> None:
        """Prove and accept this one from now on, and accept those before it for some seconds."""
        check_secret(secret)
        until = time.monotonic() + accept_old_s
        with self._lock:
            older = [(held, min(end, until)) for held, end in self._held if held != secret]
            self._held = [(bytes(secret), math.inf), *older]

    def accepted(self) -> tuple[bytes, ...]:
        with self._lock:
            self._held = [(held, end) for held, end in self._held if end > time.monotonic()]
            return tuple(held for held, _ in self._held)


class SecretFile:
    """A secret in a file, mode 600, which is read again for the next handshake once the file has changed. While there
    is a file next to it whose name has `.old` at its end, the secret in that one is accepted, too. Any thread."""

    def __init__(self, file: str | os.PathLike[str] | None = None) -> None:
        """`file`: default as for `shared_secret`. Raises `InputError` as it does."""
        self.path = _path(file)
        self._lock = threading.Lock()
        self._stamp = self._noted = self._look()
        self._accepted = self._read()

    def accepted(self) -> tuple[bytes, ...]:
        """As the files are now; where they are wrong, as they were."""
        with self._lock:
            stamp = self._look()
            if stamp != self._stamp:
                try:
                    self._accepted = self._read()
                    self._stamp = stamp
                    _log.info("read secret file %s again", self.path)
                except InputError as error:  # tried again: no descriptor may have been left
                    if stamp != self._noted:
                        _log.error("%s; what was read before stays in use", error)
                    self._noted = stamp
            return self._accepted

    def _files(self) -> tuple[Path, ...]:
        old = self.path.with_name(self.path.name + OLD)
        return (self.path, old) if os.path.exists(old) else (self.path,)  # which raises nothing

    def _look(self) -> tuple[object, ...]:
        """Changes with the files."""
        stamps = []
        for file in self._files():
            try:
                found = file.stat()
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode))
            except OSError:
                stamps.append((0, 0, 0, 0))
        return tuple(stamps)

    def _read(self) -> tuple[bytes, ...]:
        return tuple(shared_secret(file) for file in self._files())

    def __reduce__(self) -> tuple[type[SecretFile], tuple[Path]]:
        return SecretFile, (self.path,)


def as_secrets(secret: bytes | Secrets) -> Secrets:
    """Raises `InputError` where a secret is too short."""
    return secret if isinstance(secret, Secrets) else HeldSecret(secret)


def secrets_of(secret: bytes | SecretFile | None) -> HeldSecret | SecretFile:
    """What is given as a secret, by its bytes or as a file; `None`: the default file. Raises `InputError`."""
    if secret is None:
        return SecretFile()
    return secret if isinstance(secret, SecretFile) else HeldSecret(secret)


def shared_secret(file: str | os.PathLike[str] | None = None) -> bytes:
    """The secret in `file`, else in the file that `$HETKV_SECRET_FILE` names, else this user's own on this host.

    Raises `InputError` where the file cannot be read, others can use it, or it is too short.
    """
    path = _path(file)
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


def _path(file: str | os.PathLike[str] | None) -> Path:
    named = file or os.environ.get(SECRET_ENV)
    return Path(named) if named else _own_file()


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
