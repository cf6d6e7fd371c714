"""What crosses between engines besides KV, in a request's payload: `FirstToken`."""

from __future__ import annotations

import msgspec

from hetkv.errors import MessageError
from hetkv.integrations.sampling import Chosen, Sampling


class FirstToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The token that the prefill instance chose, and how the decode instance is to choose those after it."""

    token: int
    logprob: float
    """Natural logarithm of its probability, before temperature and top-k."""
    sampling: Sampling = Sampling(drawn=1)
    """For the next token: this one is counted as drawn."""

    def __post_init__(self) -> None:
        if not 0 <= self.token < 2**31:
            raise ValueError(f"token {self.token}")

    @property
    def chosen(self) -> Chosen:
        return Chosen(self.token, self.logprob)

    def encode(self) -> bytes:
        """As a payload: MessagePack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> FirstToken:
        """Raises `MessageError` for what is none."""
        try:
            return msgspec.msgpack.decode(payload, type=cls)
        except (msgspec.MsgspecError, ValueError) as error:
            raise MessageError(f"the request's payload is no first token: {error}") from None
