"""Processes in network, mount, pid and IPC namespaces of their own, as containers have: which way payloads take there,
how fast, and whether they arrive whole. Needs root and iproute2."""

from __future__ import annotations

import statistics

import pytest

from hetkv.bench import namespaces
from hetkv.bench.namespaces import HERE, Place, Places
from hetkv.bench.pair import Pair, Shape
from hetkv.control.local import FOLDER_ENV, NO_FOLDER
from hetkv.transport.config import TransferConfig

WHY_NOT = namespaces.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are namespaces")
SMALL = Shape(4, 512)
LARGE = Shape(4, 4096)
ROUNDS = 9
NO_SOCKETS = {FOLDER_ENV: NO_FOLDER}


def compare(shape: Shape, here: tuple[Places, dict[str, str]], there: tuple[Places, dict[str, str]]) -> float:
    """How much faster the pair `there` is than the one `here`, in turns."""
    with (
        Pair(shape, environment=here[1], places=here[0]) as one,
        Pair(shape, environment=there[1], places=there[0]) as two,
    ):
        assert one.verify() == two.verify() == shape.payload_bytes
        ratios = [one.send().seconds / two.send().seconds for _ in range(ROUNDS)]
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return statistics.median(ratios)


def test_network_namespaces_that_share_dev_shm() -> None:
    """Payloads are stored into the window, as in one namespace."""
    with namespaces.joined() as places:
        with Pair(SMALL, places=places) as pair:
            assert pair.verify() == SMALL.payload_bytes
            assert pair.path() == "shm"
            assert pair.senders[0].ask("stats")["slow_links"] == 0


def test_private_dev_shm_and_pids() -> None:
    """TCP, at the rate of TCP, and both sides say that the link is slow."""
    with namespaces.joined() as plain:
        a, b = (place._replace(private_shm=True, private_pids=True) for place in plain)
        with Pair(SMALL, places=(a, b)) as pair:
            assert pair.verify() == SMALL.payload_bytes
            assert pair.path() == "stream"
            assert all(child.ask("stats")["slow_links"] == 1 for child in pair.senders + pair.receivers)


@pytest.mark.slow
def test_rates() -> None:
    """A shared `/dev/shm` gives the rate of one namespace; a private one that of TCP. On an idle machine."""
    with namespaces.joined() as places:
        assert compare(LARGE, (HERE, {}), (places, {})) >= 0.8
        a, b = (place._replace(private_shm=True, private_pids=True) for place in places)
        assert compare(LARGE, (places, NO_SOCKETS), ((a, b), {})) >= 0.8


@pytest.mark.parametrize(
    "place",
    [Place(read_only_shm=True), Place(private_shm=True), Place(private_pids=True), Place(no_system_v=True)],
    ids=["read-only /dev/shm", "private /dev/shm", "private pids", "shmmni 0"],
)
def test_one_network_namespace(place: Place) -> None:
    with Pair(SMALL, places=(place, place)) as pair:
        assert pair.verify() == SMALL.payload_bytes
        assert pair.path() == "shm"


def test_read_only_dev_shm_in_two_network_namespaces() -> None:
    """The temporary folder holds the socket that both reach."""
    with namespaces.joined() as (a, b):
        with Pair(SMALL, places=(a._replace(read_only_shm=True), b._replace(read_only_shm=True))) as pair:
            assert pair.verify() == SMALL.payload_bytes
            assert pair.path() == "shm"


def test_no_unix_sockets_at_all() -> None:
    with Pair(SMALL, TransferConfig(streams=3), NO_SOCKETS) as pair:
        assert pair.verify() == SMALL.payload_bytes
        assert pair.path() == "stream"
