"""A certificate authority for tests: certificates, also expired and revoked ones, and lists of revoked ones."""

from __future__ import annotations

import datetime as dt
import os
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hetkv.control.tls import TlsConfig

DAY = dt.timedelta(days=1)


class Authority:
    """One CA, whose files are in `folder`."""

    def __init__(self, folder: Path, name: str = "hetkv test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.now = folder, dt.datetime.now(dt.timezone.utc)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._revoked: list[x509.RevokedCertificate] = []
        made = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - DAY)
            .not_valid_after(self.now + DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = self._write("ca.pem", made.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *names: str, begins: int = -1, ends: int = 1, **config: object) -> TlsConfig:
        """A side with a certificate of `names` (DNS names, URIs, addresses), valid from and until so many days from
        now; `config` replaces what `TlsConfig` says."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + begins * DAY)
            .not_valid_after(self.now + ends * DAY)
            .add_extension(x509.SubjectAlternativeName([_general(each) for each in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        certificate = self._write(f"{name}.pem", made.public_bytes(pem))
        files = {"ca": self.file, "certificate": certificate, "key": self._write(f"{name}.key", private)}
        return TlsConfig(**(files | config))

    def revoke(self, side: TlsConfig) -> None:
        """Put a certificate on the next list."""
        serial = x509.load_pem_x509_certificate(Path(side.certificate).read_bytes()).serial_number
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(self.now - DAY / 2)
        self._revoked.append(entry.build())

    def crl(self, ends: int = 1) -> str:
        """The list, valid for so many days from now."""
        made = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        made = made.last_update(self.now - 2 * DAY).next_update(self.now + ends * DAY)
        for entry in self._revoked:
            made = made.add_revoked_certificate(entry)
        signed = made.sign(self._key, hashes.SHA256())
        return self._write("crl.pem", signed.public_bytes(serialization.Encoding.PEM))

    def _write(self, name: str, data: bytes) -> str:
        """Replaced at once, as a tool that rotates certificates does."""
        path, temporary = self.folder / name, self.folder / f".{name}"
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        os.replace(temporary, path)
        return str(path)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.UniformResourceIdentifier(name) if "://" in name else x509.DNSName(name)
