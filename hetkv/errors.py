"""Every exception that hetkv raises on purpose. All are `HetkvError`; each message names the thing that is wrong."""


class HetkvError(Exception):
    """Base of all hetkv errors. Its text is one line that a user can act on."""


class InputError(HetkvError, ValueError):
    """A value, file or option that the caller gave is wrong. Nothing was changed."""
