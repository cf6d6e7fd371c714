"""What made the KV is compared before a link is made: both sides say which name differs, and both values."""

from __future__ import annotations

import logging

import pytest

from hetkv.errors import IncompatibleError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.exchange import Exchange
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, check_transfer, randomise, until

SPEC = KVSpec.uniform(2, 2, 64)
MINE = {"weights": "5e1f", "vocabulary": "77aa", "rope": "default, theta 10000"}


@pytest.mark.parametrize("name", list(MINE))
def test_another_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pools = [KVPool.allocate(SPEC, 8) for _ in range(2)]
    theirs = {**MINE, name: "another"}
    with (
        caplog.at_level(logging.WARNING, "hetkv.control"),
        Sender(pools[0], secret=SECRET, instance="p", fingerprint=MINE) as sender,
        Receiver(pools[1], secret=SECRET, instance="d", fingerprint=theirs) as receiver,
    ):
        with pytest.raises(IncompatibleError) as error:
            receiver.connect(sender.listen())
        assert (error.value.field, error.value.mine, error.value.theirs) == (
            f"fingerprint.{name}",
            "another",
            MINE[name],
        )
        until(lambda: any(f"fingerprint.{name}: this side has {MINE[name]}" in text for text in caplog.messages))
        assert sender.peers == receiver.peers == []


def test_the_same_model() -> None:
    """Linked, and the KV moves; names that one side has alone do not matter."""
    source, destination = (randomise(KVPool.allocate(SPEC, 12), seed) for seed in (1, 2))
    with (
        Sender(source, secret=SECRET, instance="p", fingerprint=MINE) as sender,
        Receiver(destination, secret=SECRET, instance="d", fingerprint={**MINE, "engine": "x"}) as receiver,
    ):
        receiver.connect(sender.listen())
        check_transfer(source, destination, sender, receiver, 100)


def test_both_roles_of_an_exchange() -> None:
    with (
        Exchange(KVPool.allocate(SPEC, 8), secret=SECRET, instance="a", fingerprint={"weights": "x"}) as mine,
        Exchange(KVPool.allocate(SPEC, 8), secret=SECRET, instance="b", fingerprint={"weights": "y"}) as theirs,
    ):
        with pytest.raises(IncompatibleError, match=r"fingerprint\.weights"):
            mine.connect(theirs.listen())
