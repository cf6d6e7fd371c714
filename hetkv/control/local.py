"""Unix sockets in addition to a listener's port: `LocalSockets`. One without a file, which works within one network
namespace, and one in a folder that containers of a host can share."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import tempfile
from pathlib import Path

FOLDER_ENV = "HETKV_SOCKET_DIR"
NO_FOLDER = "none"
"""Value of that variable for a listener without unix sockets: all its links are TCP."""
PREFIX = "hetkv-"
LONGEST = 100
"""Of the paths that a peer may name: the kernel's limit is 107."""


def is_local_name(name: str) -> bool:
    """Whether it can be the name of a listener's unix socket: a peer can name no other one."""
    plain = name.isprintable() and len(name.encode()) <= LONGEST
    if name.startswith("@"):
        return plain and name[1:].startswith(PREFIX)
    return plain and os.path.isabs(name) and os.path.basename(name).startswith(PREFIX)


class LocalSockets:
    """Listening unix sockets of this process, as many as can be made; no one is an error."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        names: list[str] = []
        self._files: list[Path] = []
        self._lock = -1
        token = PREFIX + secrets.token_hex(8)
        wanted = os.environ.get(FOLDER_ENV) != NO_FOLDER
        if wanted and self._listen("\0" + token):
            names.append("@" + token)
        for folder in _folders() if wanted else ():
            path = folder / f"{token}.sock"
            if len(os.fsencode(path)) <= LONGEST and self._claim(folder, token) and self._listen(str(path)):
                self._files.append(path)
                names.append(str(path))
                break
        self.names = tuple(names)
        """As the description carries them: `@name`, then a path."""

    def close(self) -> None:
        """Stop listening and remove the files."""
        for sock in self.sockets:
            sock.close()
        self._remove()

    def _remove(self) -> None:
        for path in self._files:
            with contextlib.suppress(OSError):
                path.unlink()
        self._files = []
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _listen(self, address: str) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(address)
            sock.listen()
            sock.setblocking(False)
            if not address.startswith("\0"):
                os.chmod(address, 0o600)
        except OSError:
            sock.close()
            return False
        self.sockets.append(sock)
        return True

    def _claim(self, folder: Path, token: str) -> bool:
        """Lock a file next to the socket's: where it is unlocked, its process is gone."""
        self._remove()
        path = folder / f"{token}.lock"
        try:
            _sweep(folder)
            self._lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            self._files.append(path)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return path.exists()  # not swept before it was locked
        except OSError:
            return False


def _folders() -> list[Path]:
    given = os.environ.get(FOLDER_ENV)
    return [Path(given).absolute()] if given else [Path("/dev/shm"), Path(tempfile.gettempdir()).absolute()]


def _sweep(folder: Path) -> None:
    """Remove what processes of this user left that were killed."""
    for path in folder.glob(f"{PREFIX}*.lock"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_suffix(".sock").unlink(missing_ok=True)
                path.unlink()
            finally:
                os.close(descriptor)
