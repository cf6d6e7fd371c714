"""The connection between an instance and its scheduler: mutual proof of the secret, then sealed messages.

Each side sends a magic and a nonce; keys come from the secret and both nonces (HKDF, as on the control channel of the
transport). The instance proves first. A frame is a length (4 bytes, little-endian), a MessagePack message, and 16
bytes of HMAC-SHA256 over its number and the message, with one key per direction. Messages are not encrypted, except
by TLS, which may be around all of it.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import sha256
from typing import Any, Literal

import msgspec

from hetkv.control.handshake import hkdf_expand, hkdf_extract
from hetkv.errors import AuthenticationError, CertificateError, HandshakeError, MessageError, SecretError
from hetkv.serve.messages import ToInstance, ToScheduler

MAGIC = b"hetkv-serve 1\n\0\0"
NAME_NOT_ALLOWED = b"hetkv-serve no\n\0"
"""In its place, from a scheduler whose list of peers has no name of the instance's certificate."""
NEEDS_TLS = b"\x15\x03\x01\x00\x02\x02\x46"
"""What a peer that speaks in clear is answered inside TLS: the alert `protocol_version`."""
NONCE_BYTES = 32
GREETING_BYTES = len(MAGIC) + NONCE_BYTES
PROOF_BYTES = 32
MAC_BYTES = 16
MAX_BYTES = 64 << 20
WRONG_SECRET = "scheduler and instance do not have the same secret"
LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")

Side = Literal["instance", "scheduler"]
_DECODERS: dict[Side, Any] = {
    "instance": msgspec.msgpack.Decoder(ToInstance),
    "scheduler": msgspec.msgpack.Decoder(ToScheduler),
}
_ENCODER = msgspec.msgpack.Encoder()


class Seal:
    """One side's keys and counters of a connection. Knows no sockets."""

    def __init__(self, side: Side, secret: bytes, mine: bytes, theirs: bytes, certificates: bytes = b"") -> None:
        """`mine` and `theirs` are the greetings that were sent and received; `certificates`: with TLS, SHA-256 of the
        instance's and of the scheduler's."""
        if side == "instance" and certificates and theirs.startswith(NAME_NOT_ALLOWED):
            text = "scheduler: TLS: this side's certificate is of no name that is on the peer's list of peers"
            raise CertificateError(text, "identity", own=True)
        if not theirs.startswith(MAGIC):
            raise HandshakeError(f"not a scheduler or an instance of this version: it began with {theirs[:16]!r}")
        if mine == theirs:
            raise AuthenticationError("the handshake was reflected")
        first, second = (mine, theirs) if side == "instance" else (theirs, mine)
        self._key = hkdf_extract(sha256(first + second + certificates).digest(), secret)
        other: Side = "scheduler" if side == "instance" else "instance"
        self.proof = self._derived(f"proof {side}")
        """What this side sends to show that it has the secret."""
        self._expected = self._derived(f"proof {other}")
        self._send_key, self._receive_key = self._derived(f"data {side}"), self._derived(f"data {other}")
        self._sent = self._received = 0
        self._decoder = _DECODERS[side]

    def _derived(self, label: str) -> bytes:
        return hkdf_expand(self._key, f"hetkv serve {label}".encode(), 32)

    def fits(self, proof: bytes) -> bool:
        """Whether the other side has the secret."""
        return hmac.compare_digest(proof, self._expected)

    def check(self, proof: bytes) -> None:
        """Raise `SecretError` unless the other side has the secret."""
        if not self.fits(proof):
            raise SecretError(WRONG_SECRET)

    def close(self, message: ToInstance | ToScheduler) -> bytes:
        """A message as a frame."""
        payload = _ENCODER.encode(message)
        if len(payload) > MAX_BYTES:
            raise MessageError(f"a message of {len(payload)} bytes is over the limit of {MAX_BYTES}")
        mac = _mac(self._send_key, self._sent, payload)
        self._sent += 1
        return LENGTH.pack(len(payload)) + payload + mac

    @staticmethod
    def rest(head: bytes) -> int:
        """Bytes of a frame after its length."""
        (length,) = LENGTH.unpack(head)
        if length > MAX_BYTES:
            raise MessageError(f"a message of {length} bytes is over the limit of {MAX_BYTES}")
        return int(length) + MAC_BYTES

    def open(self, rest: bytes) -> Any:
        """The message of a frame, once its MAC is right."""
        payload, mac = rest[:-MAC_BYTES], rest[-MAC_BYTES:]
        if not hmac.compare_digest(mac, _mac(self._receive_key, self._received, payload)):
            raise AuthenticationError(f"message {self._received} has a wrong MAC")
        self._received += 1
        try:
            return self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise MessageError(f"message {self._received - 1} is malformed: {error}") from None


def greeting(nonce: bytes) -> bytes:
    """The first bytes of a side."""
    return MAGIC + nonce


def _mac(key: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + payload, "sha256")[:MAC_BYTES]
