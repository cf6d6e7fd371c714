"""Names of sequences on the wire, alike in every engine, so that any of them can ask for what another one computed."""

from __future__ import annotations


def wire_name(transfer_id: str, position: int = 0) -> str:
    """The request id of a prompt of a request: the router's transfer id, and the prompt's place in its list.

    One request of a client may have many prompts; each needs an id of its own. Choices of one prompt share it, as they
    share its KV.
    """
    return f"{transfer_id}/{position}"
