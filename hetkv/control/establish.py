"""How two ranks come to a control connection: the handshake of either side, descriptions, verdicts, streams.

`connect` is the side that connects; `hetkv/control/listener.py` runs `receive`. Protocol: `docs/control-channel.md`.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from hetkv.control.address import Address
from hetkv.control.agreement import Agreement
from hetkv.control.channel import Channel, Records
from hetkv.control.compat import check_minor
from hetkv.control.connection import LINGER_S, ControlConnection
from hetkv.control.description import (
    Accept,
    Description,
    Message,
    Rejection,
    Streaming,
    decode,
    encode,
    for_minor,
    same_kernel,
)
from hetkv.control.handshake import Inside, Opening, Role, authenticate, other_role
from hetkv.control.reactor import Steps, run
from hetkv.control.secret import HeldSecret, Secrets, as_secrets
from hetkv.control.streams import Desk, dial
from hetkv.control.tls import Tls
from hetkv.errors import (
    ControlError,
    ControlTimeoutError,
    IncompatibleError,
    InputError,
    ListenerBusyError,
    MessageError,
    PeerLostError,
    SecretError,
)

DEFAULT_TIMEOUT_S = 10.0
SILENCE_S = 10.0
RETRY_S, MAX_RETRY_S = 0.05, 1.0

Describe = Callable[[], Description]
Admit = Callable[[Description], None]
_M = TypeVar("_M")


class Side(NamedTuple):
    """What this side is in every handshake."""

    role: Role
    secrets: Secrets
    describe: Describe
    """Makes its description, after the peer is authenticated."""
    timeout: float = DEFAULT_TIMEOUT_S
    """Of each step, in seconds."""
    tls: Tls | None = None
    silence: float = SILENCE_S
    """A peer whose host has not answered for so many seconds is lost."""
    admit: Admit | None = None
    """Called with the peer's description after it is found to fit; may raise `IncompatibleError`."""


def connect(
    address: str,
    *,
    role: Role,
    secret: bytes | Secrets,
    describe: Describe,
    timeout: float = DEFAULT_TIMEOUT_S,
    tls: Tls | None = None,
    silence: float = SILENCE_S,
    admit: Admit | None = None,
    streams: int = 1,
) -> ControlConnection:
    """Connect to a `Listener` and run the handshake, at most `timeout` seconds for each step of it.

    A listener that has too many handshakes ends some: this tries again, with growing random pauses, for `timeout`
    seconds. Where the listener does not have this side's secret, those before it that are still accepted are tried.
    `describe` makes this side's description, after the peer is authenticated. `silence` and `admit` are as for
    `Listener`. `streams`: how many connections of the data plane to make where they are TCP.

    Raises `InputError`, `PeerLostError` (no process listens there, or the peer ended), `ControlTimeoutError`,
    `AuthenticationError` with its subclasses, `MessageError`, `HandshakeError` with its subclasses `VersionError` and
    `IncompatibleError`.
    """
    side = Side(role, as_secrets(secret), describe, timeout, tls, silence, admit)
    target = Address.parse(address)
    if not target.host or not target.port:
        raise InputError(f"address {address!r}: to connect, name a host and a port")
    secrets = side.secrets.accepted()
    for number, one in enumerate(secrets):
        try:
            return _connect(target, side._replace(secrets=HeldSecret(one)), streams)
        except SecretError:
            if number == len(secrets) - 1:
                raise
    raise AssertionError("there is always a secret")


def _connect(target: Address, side: Side, streams: int) -> ControlConnection:
    deadline, pause = time.monotonic() + side.timeout, RETRY_S
    while True:
        channel = _reach(target, side.timeout)
        try:
            return run(establish(channel, side, target.host, streams))
        except ListenerBusyError:
            wait = random.uniform(pause / 2, pause)
            if time.monotonic() + wait > deadline:
                raise
            time.sleep(wait)
            pause = min(2 * pause, MAX_RETRY_S)


def _reach(target: Address, timeout: float) -> Channel:
    """A TCP connection."""
    try:
        sock = socket.create_connection(target, timeout)
    except TimeoutError:
        raise ControlTimeoutError(f"{target}: no connection within {timeout:g} s") from None
    except (OSError, UnicodeError) as error:
        raise PeerLostError(f"{target}: cannot connect: {getattr(error, 'strerror', None) or error}") from None
    try:
        return Channel(sock, str(target))
    except OSError as error:  # the peer may have reset it already
        sock.close()
        raise PeerLostError(f"{target}: {error.strerror or error}") from None


def establish(channel: Channel, side: Side, host: str, streams: int = 1) -> Steps[ControlConnection]:
    """The connecting side's handshake over a connected channel, which the connection then owns; closed on failure.

    It waits for its streams where it is run. `host`: what was connected to.
    """

    def steps() -> Steps[ControlConnection]:
        inside = None
        if side.tls is not None:
            try:
                inside = yield from enter_tls(channel, side.tls, host, side.timeout)
            except PeerLostError as error:  # without an alert: it has too many at once
                raise ListenerBusyError(str(error), errno=error.errno) from None
        keys = yield from authenticate(channel, side.secrets.accepted(), side.role, True, side.timeout, inside=inside)
        channel.end_when_silent(side.silence)
        records = Records(channel, keys.control_send, keys.control_receive)
        agreement = yield from _agree(records, channel.peer, side, True, keys.minor)
        near = same_kernel(agreement.mine.host, agreement.theirs.host)
        made = dial(keys, channel, agreement.theirs.sockets if near else (), streams, side.timeout, agreement.cipher)
        try:
            yield from records.write(encode(Streaming(made.kind, len(made))), time.monotonic() + side.timeout)
            return ControlConnection(channel, records, keys, agreement, side.timeout, made)
        except BaseException:
            made.close()
            raise

    return _owning(channel, side.timeout, steps())


def receive(
    channel: Channel,
    opening: Opening,
    desk: Desk,
    side: Side,
    inside: Inside | None = None,
    on_authenticated: Callable[[], None] = lambda: None,
) -> Steps[ControlConnection]:
    """The listening side's handshake after the hello, with the same fate of the channel."""

    def steps() -> Steps[ControlConnection]:
        secrets = side.secrets.accepted()
        keys = yield from authenticate(channel, secrets, side.role, False, side.timeout, opening, inside)
        on_authenticated()
        channel.end_when_silent(side.silence)
        records = Records(channel, keys.control_send, keys.control_receive)
        with desk.expecting(keys):
            agreement = yield from _agree(records, channel.peer, side, False, keys.minor)
            said = decode((yield from records.read(time.monotonic() + side.timeout, "streams")), channel.peer)
            if not isinstance(said, Streaming):
                raise MessageError(f"{channel.peer}: message {type(said).__name__} instead of its streams")
            made = desk.collect(keys, said.kind, said.count, channel.peer, agreement.cipher)
        return ControlConnection(channel, records, keys, agreement, side.timeout, made)

    return _owning(channel, side.timeout, steps())


def enter_tls(channel: Channel, tls: Tls, host: str | None, timeout: float) -> Steps[Inside]:
    """The TLS handshake, as a client of `host` or as a server. Raises `CertificateError`; where the certificate is not
    of an allowed name `Inside.rejection` has the error, as the peer is to hear of it."""
    credentials = tls.credentials()
    context = credentials.server if host is None else credentials.client
    yield from channel.start_tls(context, host, time.monotonic() + timeout)
    theirs, names = channel.certificate()
    return Inside(credentials.fingerprint, theirs, tls.check(channel.peer, names))


def _owning(channel: Channel, timeout: float, steps: Steps[ControlConnection]) -> Steps[ControlConnection]:
    """The steps, and the channel's end where they fail."""
    try:
        try:
            return (yield from steps)
        except (PeerLostError, ControlTimeoutError):
            raise
        except ControlError:
            yield from channel.linger(min(LINGER_S, timeout))
            raise
    except BaseException:
        channel.close()
        raise


def _description(side: Side) -> Description:
    mine = side.describe()
    if mine.role != side.role:
        raise InputError(f"this side is the {side.role}, but describes itself as {mine.role}")
    return mine


def _agree(records: Records, peer: str, side: Side, connecting: bool, minor: int) -> Steps[Agreement]:
    """Exchange descriptions and verdicts. The connecting side describes first, so that no two large writes meet."""
    mine, timeout = _description(side), side.timeout

    def write(message: Message) -> Steps[None]:
        yield from records.write(encode(message), time.monotonic() + timeout)

    def read(kind: type[_M], what: str) -> Steps[_M]:
        message = decode((yield from records.read(time.monotonic() + timeout, what)), peer)
        if isinstance(message, Rejection):
            raise IncompatibleError(message.field, message.theirs, message.mine, message.why)
        if not isinstance(message, kind):
            raise MessageError(f"{peer}: message {type(message).__name__} instead of its {what}")
        return message

    def describe() -> Steps[None]:
        try:
            check_minor(mine, minor)
        except IncompatibleError as error:
            yield from write(Rejection(error.field, error.mine, error.theirs, error.why))
            raise
        yield from write(for_minor(mine, minor))

    if connecting:
        yield from describe()
    try:
        theirs = yield from read(Description, "description")
        if theirs.role != other_role(mine.role):
            raise MessageError(f"{peer}: authenticated as {other_role(mine.role)}, describes itself as {theirs.role}")
    except MessageError as error:
        yield from write(Rejection("description", "a well-formed description expected", "a malformed one", str(error)))
        raise
    if not connecting:
        yield from describe()
    try:
        agreement = Agreement.of(mine, theirs, minor)
        if side.admit is not None:
            side.admit(theirs)
    except IncompatibleError as error:
        yield from write(Rejection(error.field, error.mine, error.theirs, error.why))
        raise
    yield from write(Accept())
    yield from read(Accept, "verdict")
    return agreement
