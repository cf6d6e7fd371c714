"""What a node shows its peers, and asks of them: `Access`, its secret and its certificate."""

from __future__ import annotations

from hetkv.control.address import Address
from hetkv.control.secret import SECRET_ENV, HeldSecret, SecretFile, is_loopback, is_named, secrets_of
from hetkv.control.tls import Tls, TlsConfig
from hetkv.errors import InputError
from hetkv.transport import device
from hetkv.transport.config import MAX_SECONDS


def available_ciphers(needed: bool) -> tuple[str, ...]:
    """Ciphers that streams can have here, best first. Raises `InputError` where one is needed and none is there."""
    from hetkv.core import core

    found = tuple(core.ciphers())
    if needed and not found:
        raise InputError("encrypt=True: this build has no libsodium")
    return found


def available_codecs(wanted: str, on_device: bool = False) -> tuple[str, ...]:
    """What a node of `TransferConfig.codec` names. Raises `InputError` where it asks for what is not there."""
    from hetkv.core import core

    if wanted in ("none", "fp8", "int4"):
        return () if wanted == "none" or (on_device and not device.DEVICE_SCALES) else (wanted,)
    if wanted == "lossless" and not core.has_zstd():
        raise InputError("codec='lossless': libzstd.so.1 is not installed here; 'auto' goes on without")
    return ("lossless",) if core.has_zstd() else ()


class Access:
    """A node's shared secret, and TLS where it has it."""

    def __init__(self, secret: bytes | SecretFile | None, tls: TlsConfig | None) -> None:
        """Raises `InputError` where either is not what it should be."""
        self._own = secret is None and not is_named()
        self.secrets = secrets_of(secret)
        if tls is not None and not isinstance(tls, TlsConfig):
            raise InputError(f"tls is a TlsConfig, not {type(tls).__name__}")
        self.tls = Tls(tls) if tls is not None else None

    def rotate(self, secret: bytes, accept_old_s: float) -> None:
        """See `Node.rotate_secret`."""
        if not isinstance(self.secrets, HeldSecret):
            raise InputError(f"the secret is that of {self.secrets.path}: write the new one there")
        if not 0 <= accept_old_s <= MAX_SECONDS:
            raise InputError(f"accept_old_s must be between 0 and {MAX_SECONDS:g} seconds, not {accept_old_s}")
        self.secrets.rotate(secret, accept_old_s)

    def check(self, address: str, verb: str) -> None:
        """Raise `InputError` for another host where the secret is this host's own."""
        if self._own and not is_loopback(Address.parse(address).host):
            raise InputError(
                f"cannot {verb} {address!r} with the secret of this host alone: give `secret`, the same on all hosts, "
                f"or name its file in {SECRET_ENV}"
            )
