"""What an instance tells the deployment around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from hetkv.simulator.request import Request

if TYPE_CHECKING:
    from hetkv.simulator.instance import Instance


class Owner(Protocol):
    """`Cluster` is one. Calls come in the middle of an instance's work, so they must not start its next step."""

    def on_chunk(self, request: Request, tokens: int, seconds: float) -> None:
        """A step that computes `tokens` of the request's prompt begins now on a prefill instance."""

    def on_prefilled(self, request: Request) -> None:
        """A prefill instance has computed all of `request.target`; it holds the KV until `release`."""

    def on_finished(self, request: Request) -> None:
        """The request's last token is out and its blocks are free."""

    def on_room(self, instance: Instance) -> None:
        """Blocks became free."""

    def on_taken(self) -> None:
        """The head of a queue went to an instance, and more requests are queued after it."""
