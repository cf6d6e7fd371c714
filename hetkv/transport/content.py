"""What a request's KV is of, as a digest that sender and receiver compare: `content_digest`."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from hetkv.errors import InputError
from hetkv.transport.blocks import plain

CONTENT_BYTES = 16


def content_digest(token_ids: Sequence[int], extra: Sequence[Any] = ()) -> bytes:
    """Digest of all that a prompt's KV depends on other than the model: 16 bytes, equal in every process and engine.

    `extra` is what else enters the computation, in an order that both sides keep: hashes of images and where they
    stand, the adapter's name, a cache salt, hashes of embeddings; anything that MessagePack can say. Raises
    `InputError`.
    """
    if isinstance(token_ids, str | bytes) or isinstance(extra, str | bytes):
        raise InputError("content: token_ids are integers, and extra is a list of what else counts, not text")
    try:
        tokens = array("q", plain(token_ids))
        head = msgspec.msgpack.encode((len(tokens), tuple(extra)), order="deterministic")
    except (TypeError, OverflowError, ValueError) as error:
        raise InputError(f"content: {error}") from None
    if sys.byteorder == "big":
        tokens.byteswap()
    digest = blake2b(head, digest_size=CONTENT_BYTES, person=b"hetkv.content.1")
    digest.update(tokens.tobytes())
    return digest.digest()


def check_content(content: bytes | None) -> bytes | None:
    """A caller's `content`, as the extension takes it. Raises `InputError` unless it is 16 bytes, not all zero."""
    if content is not None and (len(content) != CONTENT_BYTES or not any(content)):
        raise InputError(f"content must be {CONTENT_BYTES} bytes that are not all zero; `content_digest` makes them")
    return None if content is None else bytes(content)
