"""What `kv_connector_extra_config` may hold, and the secret that all instances share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hetkv.control.secret import SECRET_ENV, SecretFile, is_loopback, is_named
from hetkv.control.tls import TlsConfig
from hetkv.errors import InputError
from hetkv.transport.config import TransferConfig


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`kv_connector_extra_config` of `HetKVConnector`."""

    secret_file: str | None = None
    """File with the shared secret; default: `$HETKV_SECRET_FILE`; on one host a file of this user."""
    tls: TlsConfig | None = None
    """Certificates of this instance for TLS on the control channel; both sides need them. Default: no TLS."""
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

    def secret(self) -> SecretFile:
        """The shared secret. Where none is named and only this host takes part, a random one of this user's own.

        Raises `InputError` where the file cannot be read, others can read it, or several hosts take part without one.
        """
        if self.secret_file is None and not is_named() and not is_loopback(self.host):
            raise InputError(f"host {self.host}: set secret_file (or {SECRET_ENV}) to a file that all hosts have")
        return SecretFile(self.secret_file)
