"""`kv_transfer_params`: what a router hands from the producer to the consumer. It comes from clients, so it is checked.

| field | side | meaning |
|---|---|---|
| `do_remote_decode` | producer | compute the prompt and keep its KV for a consumer |
| `rendezvous` | producer | `prefill_first` (default) or `concurrent` |
| `describe` | producer | only answer who this is; nothing is kept |
| `do_remote_prefill` | consumer | load the prompt's KV |
| `transfer_id` | both | the router's name of the request, with all its prompts; without one the producer makes it |
| `remote_engine_id`, `remote_addresses` | consumer | who has the KV, and where its ranks listen |
| `payload` | producer | up to 64 KiB in base64 that cross with the KV, for whoever reads the consumer's response |
| `wants_payload` | consumer | `kv_transfer_params` of its response has the producer's `payload`, where it loads KV |
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Literal

import msgspec

from hetkv.control.address import Address
from hetkv.control.payloads import as_payload
from hetkv.errors import InputError

MAX_TEXT = 256
MAX_RANKS = 1024


class Produce(msgspec.Struct, frozen=True):
    """A producer's `kv_transfer_params`; fields of other connectors are ignored."""

    transfer_id: str | None = None
    rendezvous: Literal["prefill_first", "concurrent"] = "prefill_first"
    describe: bool = False
    payload: str | None = None

    def __post_init__(self) -> None:
        if self.transfer_id is not None:
            check_text("transfer_id", self.transfer_id)
        self.data()

    def data(self) -> bytes | None:
        """The payload. Raises `InputError`."""
        if self.payload is None:
            return None
        try:
            return as_payload(base64.b64decode(self.payload, validate=True))
        except (binascii.Error, ValueError) as error:  # `InputError` is one
            raise InputError(f"payload: {error}") from None


class Consume(msgspec.Struct, frozen=True):
    """A consumer's `kv_transfer_params`."""

    transfer_id: str
    remote_engine_id: str
    remote_addresses: tuple[str, ...]
    wants_payload: bool = False

    def __post_init__(self) -> None:
        for name in ("transfer_id", "remote_engine_id"):
            check_text(name, getattr(self, name))
        if not 0 < len(self.remote_addresses) <= MAX_RANKS:
            raise InputError(f"remote_addresses must have 1 to {MAX_RANKS} entries")
        for address in self.remote_addresses:
            Address.parse(address)


def check_text(name: str, text: str) -> None:
    """Raise `InputError` for what cannot name something on the wire: empty, long, or no UTF-8 (JSON can hold such)."""
    if not 0 < len(text.encode(errors="replace")) <= MAX_TEXT:
        raise InputError(f"{name} must have 1 to {MAX_TEXT} bytes")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{name} is not Unicode text")


def produce(params: dict[str, Any] | None) -> Produce | None:
    """A request that this producer computes for a consumer, or `None`. Raises `InputError`."""
    return _convert(params, Produce) if params and params.get("do_remote_decode") else None


def consume(params: dict[str, Any] | None) -> Consume | None:
    """A request whose KV this consumer loads, or `None`. Raises `InputError`."""
    return _convert(params, Consume) if params and params.get("do_remote_prefill") else None


def _convert(params: dict[str, Any], kind: type[Any]) -> Any:
    known = {name: params[name] for name in kind.__struct_fields__ if params.get(name) is not None}
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"kv_transfer_params: {error}") from None
