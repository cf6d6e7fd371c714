"""The code that puts through UCX, over UCX's transports inside a host, as no RDMA device is at hand."""

from __future__ import annotations

import pytest

from hetkv import ucx
from hetkv.core import core
from hetkv.errors import BuildError, InputError, TransportError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, check_transfer, connected, randomise, settled

SPEC = KVSpec.uniform(2, 2, 64)
SETTINGS = {"slot_bytes": 16384, "window_bytes": 4 * 16384, "direct": False, "rma": "auto"}


@pytest.fixture
def transports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `rma_transports` says; UCX is loaded."""
    try:
        found = ucx.load()
        core.load_ucx(str(found.path))
    except (BuildError, TransportError) as error:
        pytest.skip(str(error))
    chosen = ["cma,posix,self"]
    for name in ("POSIX", "CMA"):
        monkeypatch.setenv(f"UCX_{name}_ERROR_HANDLING", "y")
    monkeypatch.setattr("hetkv.transport.node.rma_transports", lambda: chosen[0])
    return chosen


def test_puts(transports: list[str]) -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 64), 1), randomise(KVPool.allocate(SPEC, 64), 2)
    with connected([source], [destination], TransferConfig(**SETTINGS)) as ([sender], [receiver]):
        for number in range(4):
            check_transfer(source, destination, sender, receiver, 501, request=f"{number}", seed=number)
        assert sender.path(sender.peers[0]) == "rma"
        settled(sender, receiver)


def test_one_side_without_it_sends_over_streams(transports: list[str]) -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 64), 1), randomise(KVPool.allocate(SPEC, 64), 2)
    without = TransferConfig(**{**SETTINGS, "rma": "off"})
    for configs in ((TransferConfig(**SETTINGS), without), (without, TransferConfig(**SETTINGS))):
        with connected([source], [destination], *configs) as ([sender], [receiver]):
            check_transfer(source, destination, sender, receiver, 501)
            assert sender.path(sender.peers[0]) == "stream"


def test_transports_that_are_not_there(transports: list[str]) -> None:
    transports[0] = "rc,dc"
    with pytest.raises(TransportError, match="no transport of rc,dc"):
        Sender(KVPool.allocate(SPEC, 4), secret=SECRET, instance="p", config=TransferConfig(**SETTINGS))


def test_a_host_without_devices_has_none() -> None:
    if ucx.has_rdma_devices():
        pytest.skip("this host has RDMA devices")
    with Sender(KVPool.allocate(SPEC, 4), secret=SECRET, instance="p", config=TransferConfig(rma="auto")) as sender:
        assert sender.description.worker_address == b""
    with pytest.raises(InputError, match="rma"):
        TransferConfig(rma="on")  # type: ignore[arg-type]
