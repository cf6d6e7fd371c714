"""Every exception that hetkv raises on purpose. All are `HetkvError`; each message names the thing that is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hetkv.planner.result import Tightest


class HetkvError(Exception):
    """Base of all hetkv errors. Its text is one line that a user can act on."""


class InputError(HetkvError, ValueError):
    """A value, file or option that the caller gave is wrong. Nothing was changed."""


class ControlError(HetkvError):
    """The control channel to one peer failed. Other peers are not affected."""


class ControlTimeoutError(ControlError, TimeoutError):
    """The peer did not answer in time."""


class PeerLostError(ControlError, ConnectionError):
    """The connection to the peer ended, or could not be made. `orderly` is true where the peer said goodbye first;
    `errno` is the system's, where it gave one."""

    def __init__(self, text: str, *, orderly: bool = False, errno: int | None = None) -> None:
        super().__init__(text)
        self.orderly, self.errno = orderly, errno


class ListenerBusyError(PeerLostError):
    """The listener ended the handshake before anything was proved: it has too many at once."""


class MessageError(ControlError):
    """The peer sent a control message that is oversized, malformed, out of sequence, or of an unknown type or field."""


class AuthenticationError(ControlError):
    """The peer did not prove that it has the shared secret, or a message's MAC is wrong."""


class SecretError(AuthenticationError):
    """The two sides have no shared secret in common."""


class CertificateError(AuthenticationError):
    """TLS: a certificate was rejected. `reason`: `unknown-ca`, `expired`, `not-yet-valid`, `revoked`, `identity` (it is
    not on the list of allowed peers), `host`, `missing`, `crl` (the list of revoked ones is missing or too old), or
    `other`. `own`: it is this side's certificate, and the peer rejected it."""

    def __init__(self, text: str, reason: str = "other", *, own: bool = False) -> None:
        super().__init__(text)
        self.reason, self.own = reason, own


class HandshakeError(ControlError):
    """The two sides cannot work together; see the subclasses and the text."""


class VersionError(HandshakeError):
    """The peer speaks another major version of the control protocol."""


class IncompatibleError(HandshakeError):
    """The two sides' descriptions do not fit: `field` names what differs, `mine` and `theirs` are values as text."""

    def __init__(self, field: str, mine: object, theirs: object, why: str = "") -> None:
        self.field, self.mine, self.theirs, self.why = field, str(mine), str(theirs), why
        super().__init__(f"{field}: this side has {mine}, the peer has {theirs}" + (f" ({why})" if why else ""))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), (self.field, self.mine, self.theirs, self.why)


class BuildError(HetkvError, ImportError):
    """The extension is not built, or its UCX is not there."""


class WireError(HetkvError):
    """Bytes that are not a message of the wire format this build reads (`docs/wire-format.md`)."""


class MalformedError(WireError):
    """Bytes that no version of the format allows; the text names the field and its value."""


class UnsupportedError(HetkvError):
    """What this build, device or peer cannot do: a version or code that it does not know, a missing capability."""


_GAVE_UP = " gave the request up: "
"""Before the reason that a peer gave, in the texts of `csrc/engine`."""


class TransferError(HetkvError):
    """A request did not complete. Its blocks on the decode side are undefined; other requests are not affected."""


class ChecksumError(TransferError):
    """A payload is not what its sender packed."""


class PoolChecksumError(ChecksumError):
    """With `verify="pool"`: the pool does not hold what was unpacked. An unpack went wrong, or something else wrote to
    the request's blocks. The sender gets `ChecksumError`."""


class ProtocolError(TransferError):
    """The peer sent what the request or the link does not allow."""


class ContentError(TransferError):
    """The two sides' requests of one id are not of one content: other tokens, images, adapters. Nothing was sent."""


class LeaseExpiredError(TransferError):
    """The request was not complete when its lease ran out, or no receiver asked for it in time."""


class AbortedError(TransferError):
    """One side gave the request up. `reason` is what it said, without what hetkv adds to the text."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.reason = text.partition(_GAVE_UP)[2] or text


class TransportError(TransferError):
    """UCX reported an error."""


class DeviceError(TransferError):
    """A GPU, its driver or its backend rejected: out of memory, a launch that failed, a device that is not there."""


class ClosedError(TransferError):
    """The sender or receiver was closed."""


class WaitTimeoutError(HetkvError, TimeoutError):
    """A wait ended before the thing waited for; the request goes on."""


class PoolFullError(HetkvError):
    """A pool or an engine has no room for a sequence. Nothing was allocated; try again once another one has ended."""


class GenerationError(HetkvError):
    """The fleet of `hetkv serve` could not complete a sequence."""


class ApiError(HetkvError):
    """A request to the server of `hetkv serve` that is answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        """Of HTTP."""
        self.code, self.param = code, param
        """OpenAI's word for it, and the field that is wrong."""


class BenchmarkError(HetkvError):
    """Benchmarks: a process that is measured failed, or what arrived is not what was sent."""


class UcxToolError(BenchmarkError):
    """A program of UCX is missing, failed, or printed what this version does not read."""


class UndecidedError(HetkvError):
    """Planner: a limit ended the integer program before it had counts, or a proof that there are none."""


class InfeasibleError(InputError):
    """Planner: no deployment of the offered GPUs meets the targets. The text names the tightest constraint."""

    def __init__(self, text: str, tightest: Tightest) -> None:
        self.tightest = tightest
        super().__init__(text)


class NotCoveredError(HetkvError):
    """Planner: another planner that is compared cannot be asked this question; the text says why."""


_BY_CODE: dict[int, type[HetkvError]] = {
    1: InputError,
    2: MalformedError,
    3: UnsupportedError,
    4: AuthenticationError,
    14: PoolChecksumError,  # before its base, for to_code
    5: ChecksumError,
    6: ProtocolError,
    7: PeerLostError,
    8: LeaseExpiredError,
    9: AbortedError,
    10: TransportError,
    11: ClosedError,
    12: ContentError,
    13: DeviceError,
}


def from_code(code: int, detail: str) -> HetkvError:
    """The exception of a code of `csrc/status.h`."""
    return _BY_CODE.get(code, TransferError)(detail)


def to_code(error: HetkvError) -> int:
    """The code of an exception, for the other way round."""
    return next((code for code, kind in _BY_CODE.items() if isinstance(error, kind)), 10)
