"""Control messages of a link that is ready: payloads of requests, and notifications (from minor 6 on)."""

from __future__ import annotations

import msgspec

from hetkv.errors import InputError

MESSAGES_SINCE = 6
"""Minor version from which links have these messages."""
MAX_PAYLOAD_BYTES = 64 * 1024
"""Of a request's payload, and of a notification."""
MAX_LATER_BYTES = MAX_PAYLOAD_BYTES + 4096
"""Of any control message once the link's two sides have found that they fit."""
MAX_NOTIFICATIONS = 256
"""That one side of a link has sent and the other one's program has not taken."""
REQUEST_BYTES = 16


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="ask"):
    """The receiver wants the payload of a request, now or once there is one."""

    request: bytes
    """The 16 bytes that name it."""
    content: bytes = b""
    """Its digest; empty: it has none."""

    def __post_init__(self) -> None:
        _check_request(self.request)
        _check_content(self.content)


class Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="payload"):
    """The sender's answer."""

    request: bytes
    data: bytes
    content: bytes = b""
    """As in the question: the answer to an earlier one, of another request of this id, may still be on its way."""

    def __post_init__(self) -> None:
        _check_request(self.request)
        _check_content(self.content)
        _check_data(self.data)


class Notice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="notice"):
    """A notification; what it means is the two programs' business."""

    data: bytes

    def __post_init__(self) -> None:
        _check_data(self.data)


class Taken(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="taken"):
    """The program has taken so many more notifications."""

    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_NOTIFICATIONS:
            raise InputError(f"{self.count} notifications were taken: 1 to {MAX_NOTIFICATIONS}")


Later = Ask | Payload | Notice | Taken


def as_payload(data: bytes | bytearray | memoryview) -> bytes:
    """The caller's bytes, as they are sent. Raises `InputError` for more than 64 KiB, and what is no bytes."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InputError(f"a payload is bytes, not {type(data).__name__}")
    if memoryview(data).nbytes > MAX_PAYLOAD_BYTES:
        raise InputError(f"a payload of {memoryview(data).nbytes} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    return bytes(data)


def _check_request(request: bytes) -> None:
    if len(request) != REQUEST_BYTES:
        raise InputError(f"request has {len(request)} bytes, not {REQUEST_BYTES}")


def _check_content(content: bytes) -> None:
    if len(content) not in (0, REQUEST_BYTES):
        raise InputError(f"content has {len(content)} bytes, not {REQUEST_BYTES}")


def _check_data(data: bytes) -> None:
    if len(data) > MAX_PAYLOAD_BYTES:
        raise InputError(f"data has {len(data)} bytes, over {MAX_PAYLOAD_BYTES}")
