"""TLS 1.3 with certificates on both sides of the control channel: `TlsConfig`, and `Tls`, its contexts.

What a certificate has to be, and what is derived from the two, is in `docs/control-channel.md`, "TLS".
"""

from __future__ import annotations

import hashlib
import logging
import re
import ssl
import stat
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from hetkv.errors import AuthenticationError, CertificateError, InputError

_log = logging.getLogger(__name__)
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Files (PEM) and rules. The files are read again for new connections once they have changed."""

    ca: str
    """Certificates of the authorities that peers' certificates must come from."""
    certificate: str
    """This side's certificate, followed by those between it and the authority."""
    key: str | None = None
    """Its private key, mode 600; default: in `certificate`."""
    crl: str | None = None
    """Revoked certificates: a list of each authority of a chain. One that is missing or too old rejects all peers."""
    peers: tuple[str, ...] = ()
    """Names that peers may have: a DNS name, a URI such as a SPIFFE id, or a URI that ends in `/*` for all below it.
    A name of the certificate's alternative names must be one of these. Empty: all that the authorities vouch for may
    connect, and the side that connects checks the host of the address."""

    def __post_init__(self) -> None:
        for name in ("ca", "certificate", "key", "crl"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (name in ("ca", "certificate") or value is not None):
                raise InputError(f"tls.{name} is a file name, not {value!r}")
        if not isinstance(self.peers, (tuple, list)) or not all(isinstance(peer, str) for peer in self.peers):
            raise InputError(f"tls.peers are names, not {self.peers!r}")
        for peer in self.peers:
            if not peer or "*" in peer.removesuffix("/*") or ("*" in peer and "://" not in peer):
                raise InputError(f"tls.peers: {peer!r} is neither a DNS name nor a URI, which may end in /*")


class Credentials(NamedTuple):
    """What one handshake needs."""

    client: ssl.SSLContext
    server: ssl.SSLContext
    fingerprint: bytes
    """SHA-256 of this side's certificate."""


class Tls:
    """A configuration's contexts. Any thread.

    Raises `InputError` where a file cannot be read, or does not hold what it should. Files that are wrong later leave
    what was read before in use, and are logged.
    """

    def __init__(self, config: TlsConfig) -> None:
        self.config = config
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._noted = ""
        self._credentials = self._load()

    def credentials(self) -> Credentials:
        """Of the files as they are now."""
        with self._lock:
            try:
                stamp = self._look()
                if stamp != self._stamp:
                    self._credentials = self._load()
                    self._stamp, self._noted = stamp, ""
                    _log.info("tls: read %s again", self.config.certificate)
            except InputError as error:  # tried again: no descriptor may have been left
                if str(error) != self._noted:
                    _log.error("%s; what was read before stays in use", error)
                self._noted = str(error)
            return self._credentials

    def check(self, peer: str, names: Iterable[str]) -> CertificateError | None:
        """The rejection of a peer whose certificate has these names, if it is one."""
        names = tuple(names)
        if not self.config.peers or any(is_allowed(name, self.config.peers) for name in names):
            return None
        shown = ", ".join(names) or "no name"
        text = f"{peer}: TLS: the peer's certificate is of {shown}, which is not on this side's list of peers"
        return CertificateError(text, "identity")

    def _look(self) -> tuple[object, ...]:
        """Changes with the files."""
        files = (self.config.ca, self.config.certificate, self.config.key, self.config.crl)
        stamps = []
        for file in files:
            if file is not None:
                try:
                    found = Path(file).stat()
                except OSError as error:
                    raise InputError(f"tls: {file}: {error.strerror}") from None
                stamps.append((found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode))
        return tuple(stamps)

    def _load(self) -> Credentials:
        key = self.config.key or self.config.certificate
        try:
            mode = Path(key).stat().st_mode
        except OSError as error:
            raise InputError(f"tls: {key}: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"tls: private key {key} can be used by others: chmod 600 it")
        try:
            found = _PEM.search(Path(self.config.certificate).read_text("ascii", "replace"))
            own = ssl.PEM_cert_to_DER_cert(found.group()) if found else b""
        except (OSError, ValueError) as error:
            raise InputError(f"tls: {self.config.certificate}: {error}") from None
        return Credentials(self._context(False), self._context(True), hashlib.sha256(own).digest())

    def _context(self, server: bool) -> ssl.SSLContext:
        config = self.config
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = not server and not config.peers
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # a resumed session would not look at the certificate again
        file = config.ca
        try:
            context.load_verify_locations(file)
            file = config.key or config.certificate
            context.load_cert_chain(config.certificate, config.key, password="")
            if config.crl is not None:
                file = config.crl
                context.load_verify_locations(file)
                context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        except (OSError, ValueError) as error:  # `SSLError` is one
            raise InputError(f"tls: {file}: {getattr(error, 'reason', None) or error}") from None
        return context


def is_allowed(name: str, peers: Iterable[str]) -> bool:
    """Whether a name of a certificate is on the list."""
    for peer in peers:
        if peer.endswith("/*") and "://" in peer:
            if name.startswith(peer[:-1]) and len(name) > len(peer) - 1:
                return True
        elif name == peer or ("://" not in peer and name.lower() == peer.lower()):
            return True
    return False


def names_of(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """DNS names and URIs of what `SSLSocket.getpeercert` returns."""
    pairs = (certificate or {}).get("subjectAltName", ())
    return tuple(value for kind, value in pairs if kind in ("DNS", "URI"))


_UNKNOWN = ("unknown-ca", "is not of an authority that this side trusts")
_NO_CRL = ("crl", "cannot be judged: there is no list of revoked certificates of its authority")
_OLD_CRL = ("crl", "cannot be judged: the list of revoked certificates is too old")
_HOST = ("host", "is not of the host that this side connects to")
_VERIFY = {
    2: _UNKNOWN, 7: _UNKNOWN, 18: _UNKNOWN, 19: _UNKNOWN, 20: _UNKNOWN, 21: _UNKNOWN, 30: _UNKNOWN,
    3: _NO_CRL, 33: _NO_CRL, 11: _OLD_CRL, 12: _OLD_CRL,
    9: ("not-yet-valid", "is not valid yet"), 10: ("expired", "has expired"), 23: ("revoked", "was revoked"),
    62: _HOST, 64: _HOST,
}  # fmt: skip
"""By OpenSSL's code (X509_V_ERR_...): the reason, and what is said of the peer's certificate."""
_ALERTS = {
    "CERTIFICATE_EXPIRED": ("expired", "the peer says that this side's certificate, or its own CRL, has expired"),
    "CERTIFICATE_REVOKED": ("revoked", "the peer says that this side's certificate was revoked"),
    "UNKNOWN_CA": ("unknown-ca", "the peer does not trust the authority of this side's certificate, or lacks its CRL"),
    "DECRYPT_ERROR": ("unknown-ca", "the peer does not trust the signature of this side's certificate"),
    "CERTIFICATE_REQUIRED": ("missing", "the peer asks for a certificate, and this side shows none"),
    "CERTIFICATE": ("other", "the peer rejected this side's certificate"),
}
"""By a part of the name of the peer's alert; the first that fits."""


def tls_error(peer: str, error: ssl.SSLError) -> AuthenticationError:
    """What a failure of OpenSSL means."""
    name = (error.reason or str(error)).upper().replace(" ", "_")
    if isinstance(error, ssl.SSLCertVerificationError):
        reason, what = _VERIFY.get(error.verify_code, ("other", f"was rejected: {error.verify_message}"))
        return CertificateError(f"{peer}: TLS: the peer's certificate {what}", reason)
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in name:
        return CertificateError(f"{peer}: TLS: the peer showed no certificate", "missing")
    if "ALERT" in name:
        for part, (reason, text) in _ALERTS.items():
            if part in name:
                return CertificateError(f"{peer}: TLS: {text}", reason, own=True)
    if "WRONG_VERSION_NUMBER" in name or "HTTP_REQUEST" in name:
        return AuthenticationError(f"{peer}: TLS failed: the peer does not speak it")
    return AuthenticationError(f"{peer}: TLS failed: {error.reason or error}")
