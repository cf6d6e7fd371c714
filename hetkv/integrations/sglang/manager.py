"""What the two sides need of SGLang's manager, without SGLang's types: `Manager`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import msgspec

from hetkv.errors import HetkvError
from hetkv.integrations.sglang.messages import Ask

_log = logging.getLogger(__name__)


class Manager(Protocol):
    """`HetkvKVManager` is one. Any thread may call its methods."""

    kv_args: Any
    """SGLang's `KVArgs`."""
    local_ip: str
    rank_port: int
    """Where `hear` gets its messages."""
    waiting_timeout: float
    """Of a decode rank: seconds until a request's KV must be there."""
    transfer_infos: dict[int, dict[str, Ask]]
    """Of a prefill rank: by room and by the decode rank's address."""

    def hear(self) -> list[bytes]:
        """The frames of the next message; waits for it."""

    def write(self, ip: str, port: int, frames: list[bytes]) -> None:
        """Send a message to another rank. Raises what its socket raises."""

    def fail(self, room: int, reason: str) -> None:
        """A request has failed here. Nothing happens where SGLang has ended it."""

    def succeed(self, room: int) -> None:
        """Of a decode rank: the request's KV and metadata are here."""

    def ready(self, room: int, prefix: int) -> None:
        """Of a prefill rank: all decode ranks have asked; they have `prefix` tokens already."""

    def sending(self, room: int) -> None:
        """Of a prefill rank: some of the request has been handed over."""

    def conclude(self, room: int, failure: str | None) -> None:
        """Of a prefill rank: the request is complete, or has failed; the decode ranks hear of it."""

    def take_abort(self, frames: list[bytes]) -> None:
        """Of a prefill rank: a decode rank gives a request up."""

    def take_status(self, frames: list[bytes]) -> None:
        """Of a decode rank: a message of SGLang's own from a prefill rank, which may say that a request has failed."""


def hear_all(manager: Manager, take: Callable[[list[bytes]], None]) -> NoReturn:
    """Body of a thread: `take` each message that comes. One that is not understood is dropped."""
    while True:
        frames = manager.hear()
        try:
            take(frames)
        except Exception as error:
            expected = isinstance(error, (msgspec.MsgspecError, HetkvError, IndexError))
            _log.warning("a message of %d frames is dropped: %s", len(frames), error, exc_info=not expected)
