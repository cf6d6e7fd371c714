"""Every exception that hetkv raises on purpose. All are `HetkvError`; each message names the thing that is wrong."""


class HetkvError(Exception):
    """Base of all hetkv errors. Its text is one line that a user can act on."""


class InputError(HetkvError, ValueError):
    """A value, file or option that the caller gave is wrong. Nothing was changed."""


class WireError(HetkvError):
    """Bytes that are not a message of the wire format this build reads (`docs/wire-format.md`)."""


class MalformedError(WireError):
    """Bytes that no version of the format allows; the text names the field and its value."""


class UnsupportedError(WireError):
    """A version, or a code of a later minor version, that this build does not know."""


class AuthenticationError(HetkvError):
    """A MAC or a sequence number is wrong: the bytes are not what the peer of this link sent next."""


class ChecksumError(HetkvError):
    """A payload is not what its sender packed."""
