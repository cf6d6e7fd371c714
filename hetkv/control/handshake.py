"""Mutual authentication of the control channel by a shared secret: hello, key schedule, proofs.

`docs/control-channel.md` is normative. Nothing but fixed-size records is read before the peer has proved the secret.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import struct
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from hetkv._version import __version__
from hetkv.control.channel import Channel
from hetkv.control.reactor import Steps
from hetkv.errors import (
    AuthenticationError,
    CertificateError,
    HandshakeError,
    InputError,
    ListenerBusyError,
    PeerLostError,
    SecretError,
    VersionError,
)

Role = Literal["sender", "receiver"]

MAJOR = 2
MINOR = 7
TLS_SINCE = 5
"""Minor version from which the keys of a connection inside TLS depend on both certificates."""
MIN_SECRET_BYTES = 16
MAGIC = b"hetkvctl"
STREAM_MAGIC = b"hetkvdat"
"""What a connection of the data plane begins with, on the same port: `hetkv.control.streams`."""
MOST_STREAMS = 8
"""Of one link."""
NONCE_BYTES = 32

_FIXED = struct.Struct("<8sHHI")
"""First 16 bytes of every hello of every version: magic, major, minor, length of the whole hello."""
_HELLO = struct.Struct("<8sHHIB7x32s32s")
_PROOF = struct.Struct("<B3x32s")
_PROVE, _ALERT, _NOT_ALLOWED, _NEEDS_TLS = 1, 2, 3, 4
_ROLES: dict[Role, int] = {"sender": 1, "receiver": 2}
WRONG_SECRET = "authentication failed: the two sides do not have the same secret"


class Hello(NamedTuple):
    """What each side says before anything is proved."""

    major: int
    minor: int
    role: Role
    nonce: bytes
    version: str
    """Version of hetkv, for the error text."""

    def encode(self) -> bytes:
        """The hello's bytes; they are the transcript."""
        version = self.version.encode()[:32]
        return _HELLO.pack(MAGIC, self.major, self.minor, _HELLO.size, _ROLES[self.role], self.nonce, version)


class Keys(NamedTuple):
    """Keys of one connection, as one side uses them."""

    control_send: bytes
    control_receive: bytes
    data_send: bytes
    """SipHash key of the messages that this side sends on the data plane: 16 bytes."""
    data_receive: bytes
    link_id: int
    """64-bit number of this connection, the same on both sides and different for every connection. Not secret."""
    minor: int
    """The lower of the two sides' minor versions, for the data plane too."""
    call_send: bytes
    """Proof that a stream belongs to this connection: 32 bytes."""
    call_receive: bytes
    streams: tuple[tuple[bytes, bytes], ...]
    """SipHash keys of the frames on each stream: send, receive."""
    seals: tuple[tuple[bytes, bytes], ...]
    """The same for a stream that is encrypted: 32 bytes each."""


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    """HKDF-Extract with SHA-256 (RFC 5869, 2.2)."""
    return hmac.digest(salt, secret, "sha256")


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand with SHA-256 (RFC 5869, 2.3); at most 8160 bytes."""
    block, output = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


class Schedule:
    """All keys of one connection, from the secret and both hellos. Both sides compute the same.

    `certificates`: of a connection inside TLS, SHA-256 of the sender's, then of the receiver's.
    """

    def __init__(self, secret: bytes, sender_hello: bytes, receiver_hello: bytes, certificates: bytes = b"") -> None:
        self.transcript = hashlib.sha256(sender_hello + receiver_hello + certificates).digest()
        self._key = hkdf_extract(self.transcript, secret)

    def key(self, label: str, length: int) -> bytes:
        """`length` bytes for one label of the key table."""
        return hkdf_expand(self._key, f"hetkv control {MAJOR} {label}".encode(), length)

    def proof(self, role: Role) -> bytes:
        """What the side of that role sends to show that it has the secret: 32 bytes."""
        return hmac.digest(self.key(f"proof {role}", 32), self.transcript, "sha256")

    def keys(self, role: Role, minor: int = MINOR) -> Keys:
        """The keys as the side of that role uses them, for a connection of that minor version."""
        other = other_role(role)
        return Keys(
            self.key(f"control {role}", 32),
            self.key(f"control {other}", 32),
            self.key(f"data {role}", 16),
            self.key(f"data {other}", 16),
            int.from_bytes(self.key("link", 8), "little"),
            minor,
            self.key(f"call {role}", 32),
            self.key(f"call {other}", 32),
            tuple(
                (self.key(f"stream {i} {role}", 16), self.key(f"stream {i} {other}", 16)) for i in range(MOST_STREAMS)
            ),
            tuple((self.key(f"seal {i} {role}", 32), self.key(f"seal {i} {other}", 32)) for i in range(MOST_STREAMS)),
        )


def other_role(role: Role) -> Role:
    """The peer's role."""
    return "receiver" if role == "sender" else "sender"


def check_secret(secret: bytes) -> None:
    """Raise `InputError` unless the secret is bytes and long enough."""
    if not isinstance(secret, (bytes, bytearray)) or len(secret) < MIN_SECRET_BYTES:
        raise InputError(f"the shared secret must be bytes, {MIN_SECRET_BYTES} or more")


class Opening(NamedTuple):
    """How a connection began: this side's hello, and the first bytes of the peer's."""

    mine: Hello
    sent: bytes
    magic: bytes


def greet(channel: Channel, role: Role, timeout: float) -> Steps[Opening]:
    """Send this side's hello and read what the peer's begins with: `MAGIC`, or `STREAM_MAGIC`."""
    mine = Hello(MAJOR, MINOR, role, os.urandom(NONCE_BYTES), __version__)
    sent = mine.encode()
    yield from channel.write(sent, time.monotonic() + timeout)
    magic = yield from channel.read(len(MAGIC), time.monotonic() + timeout, "hello")
    return Opening(mine, sent, magic)


class Inside(NamedTuple):
    """What TLS says of the two sides: SHA-256 of each certificate, and whether the peer's is rejected."""

    mine: bytes
    theirs: bytes
    rejection: CertificateError | None = None


def authenticate(
    channel: Channel,
    secrets: Sequence[bytes],
    role: Role,
    connecting: bool,
    timeout: float,
    opening: Opening | None = None,
    inside: Inside | None = None,
) -> Steps[Keys]:
    """Run the handshake up to the keys. Each step may take `timeout` seconds, however slowly the bytes trickle.

    The connecting side proves first, so that a listener gives an unknown client no MAC to guess the secret from. It
    proves the first of the secrets; the listening side takes any. `inside`: where the channel is inside TLS.
    Raises `AuthenticationError` with its subclasses, `VersionError`, `HandshakeError`, `PeerLostError`,
    `ControlTimeoutError`; on the connecting side `ListenerBusyError` where trying again may help.
    """
    greeted = False
    try:
        mine, sent, magic = opening or (yield from greet(channel, role, timeout))
        theirs, received = yield from read_hello(channel, time.monotonic() + timeout, magic)
        greeted = True
        if hmac.compare_digest(theirs.nonce, mine.nonce):
            raise AuthenticationError(f"{channel.peer}: handshake was reflected: the peer sent this side's own nonce")
        if theirs.role == role:
            raise HandshakeError(f"{channel.peer}: both sides are {role}s")
        if inside is not None and theirs.minor < TLS_SINCE:
            raise VersionError(
                f"{channel.peer}: with TLS both sides need control protocol {MAJOR}.{TLS_SINCE}, the peer has "
                f"{MAJOR}.{theirs.minor}"
            )
        if inside is not None and inside.rejection is not None:
            yield from _say(channel, _NOT_ALLOWED, timeout)
            raise inside.rejection
        ours, others = (inside.mine, inside.theirs) if inside is not None else (b"", b"")
        inputs = (sent, received, ours + others) if role == "sender" else (received, sent, others + ours)
        schedules = [Schedule(secret, *inputs) for secret in secrets]
        schedule = schedules[0]
        if connecting:
            yield from _say(channel, _PROVE, timeout, schedule.proof(role))
            yield from _verify(channel, [schedule], other_role(role), timeout)
        else:
            schedule = yield from _verify(channel, schedules, other_role(role), timeout)
            yield from _say(channel, _PROVE, timeout, schedule.proof(role))
    except PeerLostError as error:
        if connecting and (greeted or inside is not None or error.errno == errno.ECONNRESET):
            raise ListenerBusyError(str(error), errno=error.errno) from None
        raise
    return schedule.keys(role, min(mine.minor, theirs.minor))


def ask_for_tls(channel: Channel, timeout: float) -> Steps[None]:
    """Tell a peer that began without TLS that this side needs it, in place of a proof."""
    yield from _say(channel, _NEEDS_TLS, timeout)


def read_hello(channel: Channel, deadline: float, start: bytes = b"") -> Steps[tuple[Hello, bytes]]:
    """The peer's hello, checked, and its bytes, of which `start` has been read."""
    start += yield from channel.read(_FIXED.size - len(start), deadline, "hello")
    magic, major, minor, length = _FIXED.unpack(start)
    if magic != MAGIC:
        raise HandshakeError(f"{channel.peer}: not a hetkv control channel: the peer began with {magic!r}")
    if major != MAJOR:
        raise VersionError(
            f"{channel.peer}: the peer speaks control protocol {major}.{minor}, this side {MAJOR}.{MINOR}"
        )
    if length != _HELLO.size:
        raise HandshakeError(f"{channel.peer}: hello of {length} bytes, expected {_HELLO.size}")
    data = start + (yield from channel.read(length - len(start), deadline, "hello"))
    code, nonce, version = _HELLO.unpack(data)[4:]
    role = next((name for name, number in _ROLES.items() if number == code), None)
    if role is None:
        raise HandshakeError(f"{channel.peer}: hello with unknown role {code}")
    text = version.rstrip(b"\0").decode("ascii", "replace")
    hello = Hello(major, minor, role, nonce, text)
    if hello.encode() != data:
        raise HandshakeError(f"{channel.peer}: hello with reserved bytes that are not zero")
    return hello, data


def _say(channel: Channel, kind: int, timeout: float, proof: bytes = bytes(32)) -> Steps[None]:
    yield from channel.write(_PROOF.pack(kind, proof), time.monotonic() + timeout)


def _verify(channel: Channel, schedules: Sequence[Schedule], role: Role, timeout: float) -> Steps[Schedule]:
    """Read the peer's proof, and which secret it is of; on a wrong one say so, so that both sides report the same."""
    kind, proof = _PROOF.unpack((yield from channel.read(_PROOF.size, time.monotonic() + timeout, "proof")))
    if kind == _NOT_ALLOWED:
        text = f"{channel.peer}: TLS: this side's certificate is of no name that is on the peer's list of peers"
        raise CertificateError(text, "identity", own=True)
    if kind == _NEEDS_TLS:
        raise CertificateError(
            f"{channel.peer}: TLS: the peer asks for it, and this side has none", "missing", own=True
        )
    if kind == _PROVE:
        for schedule in schedules:
            if hmac.compare_digest(proof, schedule.proof(role)):
                return schedule
        yield from _say(channel, _ALERT, timeout)
    raise SecretError(f"{channel.peer}: {WRONG_SECRET}")
