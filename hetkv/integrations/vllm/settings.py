"""What `kv_connector_extra_config` may hold, and the secret that all instances share."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hetkv.control.handshake import MIN_SECRET_BYTES
from hetkv.errors import InputError
from hetkv.transport.config import TransferConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECRET_ENV = "HETKV_SECRET_FILE"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`kv_connector_extra_config` of `HetKVConnector`."""

    secret_file: str | None = None
    """File with the shared secret; default: `$HETKV_SECRET_FILE`; on one host a file of this user."""
    host: str = "127.0.0.1"
    """Producer: address of this host to listen at, as consumers reach it."""
    port: int = 0
    """Producer: rank r listens at `port + r`. 0: any free port; consumers learn it with each request."""
    layerwise: bool = False
    """Ask vLLM for piecewise CUDA graphs, so that layers can leave while later ones compute (mode `concurrent`)."""
    transfer: TransferConfig = msgspec.field(default_factory=TransferConfig)
    """Settings of the transport: `lease_s` and `hold_s` are a consumer's and a producer's patience."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"port {self.port}: from 0 to 65535")

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Settings:
        """Raises `InputError` that names an unknown key or a wrong value."""
        try:
            return msgspec.convert(dict(extra), cls)
        except msgspec.ValidationError as error:
            raise InputError(f"kv_connector_extra_config: {error}") from None

    def address(self, rank: int) -> str:
        """Where a rank of the producer listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port + rank if self.port else 0}"

    def secret(self) -> bytes:
        """The shared secret. Where none is named and only this host takes part, a random one of this user's own.

        Raises `InputError` where the file cannot be read, others can read it, or several hosts take part without one.
        """
        named = self.secret_file or os.environ.get(SECRET_ENV)
        if named is None and self.host not in LOOPBACK:
            raise InputError(f"host {self.host}: set secret_file (or {SECRET_ENV}) to a file that all hosts have")
        path = Path(named) if named is not None else _own_secret()
        try:
            info = path.stat()
            data = path.read_bytes().strip()
        except OSError as error:
            raise InputError(f"secret file {path}: {error.strerror}") from None
        if info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"secret file {path} can be used by others: chmod 600 it")
        if len(data) < MIN_SECRET_BYTES:
            raise InputError(f"secret file {path} has {len(data)} bytes, {MIN_SECRET_BYTES} or more are needed")
        return data


def _own_secret() -> Path:
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
        raise InputError(f"{folder}: {error.strerror}; set secret_file (or {SECRET_ENV})") from None
    return path
