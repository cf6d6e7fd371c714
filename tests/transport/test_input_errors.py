"""Arguments that cannot be: one `InputError` that names the thing, and nothing remains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hetkv.costmodel.calibration_file import load_efficiencies, load_links
from hetkv.costmodel.catalogue import load_catalogue
from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.content import content_digest
from hetkv.transport.handle import request_key
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SPEC = KVSpec.uniform(1, 2, 8)
ARRAY = np.zeros((2, 4, 16, 2, 8), np.float32)
CASES: dict[str, tuple[Callable[[], object], str]] = {
    "an axis with a typo": (
        lambda: KVPool.from_tensors(SPEC, [ARRAY], "segment blocks token head channel"),
        "'blocks' is no axis; known are segment, block, token",
    ),
    "an array for a pool": (lambda: Sender(ARRAY, instance="p"), "pool is a KVPool, not ndarray"),  # type: ignore[arg-type]
    "no layers": (lambda: KVSpec.uniform(0, 2, 8), "num_layers 0: a whole number from 1"),
    "layers as text": (lambda: KVSpec.uniform("2", 2, 8), "num_layers '2': a whole number"),  # type: ignore[arg-type]
    "an empty request id": (lambda: request_key(""), "request id '' must be a UUID, text that is not empty"),
    "text for tokens": (lambda: content_digest("abc"), "token_ids are integers"),  # type: ignore[arg-type]
    "text for a list": (lambda: content_digest([1], extra="salt"), "extra is a list"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_thing_is_named(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises(InputError, match=message):
        call()


def test_an_address_book_that_cannot_be_written() -> None:
    pool = KVPool.from_tensors(SPEC, [ARRAY], "segment block token head channel")
    with Receiver(pool, instance="d") as receiver:
        with pytest.raises(InputError, match=r"/no/such/folder/a\.book: No such file or directory"):
            receiver.listen("127.0.0.1:0", book="/no/such/folder/a.book")
        assert not receiver._listeners


def test_a_timeout_that_is_no_number() -> None:
    pool = KVPool.from_tensors(SPEC, [ARRAY], "segment block token head channel")
    with Sender(pool, instance="p") as sender:
        handle = sender.send("r", [0], 4)
        for wait in (handle.wait, handle.wait_packed):
            with pytest.raises(InputError, match="a timeout is a number of seconds or None, not 'x'"):
                wait("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [load_catalogue, load_efficiencies, load_links])
def test_a_file_that_is_no_text(read: Callable[[list[Path]], object], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"gpus: \xff\xfe")
    with pytest.raises(InputError, match=r"mine\.yaml: not UTF-8 text"):
        read([file])
