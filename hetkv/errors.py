"""Every exception that hetkv raises on purpose. All are `HetkvError`; each message names the thing that is wrong."""


class HetkvError(Exception):
    """Base of all hetkv errors. Its text is one line that a user can act on."""


class InputError(HetkvError, ValueError):
    """A value, file or option that the caller gave is wrong. Nothing was changed."""


class ControlError(HetkvError):
    """The control channel to one peer failed. Other peers are not affected."""


class ControlTimeoutError(ControlError, TimeoutError):
    """The peer did not answer in time."""


class PeerLostError(ControlError, ConnectionError):
    """The connection to the peer ended, or could not be made. `orderly` is true where the peer said goodbye first."""

    def __init__(self, text: str, *, orderly: bool = False) -> None:
        super().__init__(text)
        self.orderly = orderly


class MessageError(ControlError):
    """The peer sent a control message that is oversized, malformed, out of sequence, or of an unknown type or field."""


class AuthenticationError(ControlError):
    """The peer did not prove that it has the shared secret, or a message's MAC is wrong."""


class HandshakeError(ControlError):
    """The two sides cannot work together; see the subclasses and the text."""


class VersionError(HandshakeError):
    """The peer speaks another major version of the control protocol."""


class IncompatibleError(HandshakeError):
    """The two sides' descriptions do not fit: `field` names what differs, `mine` and `theirs` are values as text."""

    def __init__(self, field: str, mine: object, theirs: object, why: str = "") -> None:
        self.field, self.mine, self.theirs, self.why = field, str(mine), str(theirs), why
        super().__init__(f"{field}: this side has {mine}, the peer has {theirs}" + (f" ({why})" if why else ""))
