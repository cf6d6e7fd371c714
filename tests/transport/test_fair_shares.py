"""Several links of one sender, and several requests of one link: who goes first. Judged by the order in which bundles
are packed, which the trace has, not by time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

import pytest

from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.handle import Handle
from hetkv.transport.sender import Sender
from tests.transport.peers import WAIT_S, connected, randomise, settled

SPEC = KVSpec.uniform(4, 2, 64)
BLOCKS = 1024
SLOT = 16 << 10
"""Holds 32 tokens of a layer: two blocks."""
BUSY_TOKENS, TOKENS = 4096, 1024
TRIES = 8
CONFIG = TransferConfig(slot_bytes=SLOT, window_bytes=8 * SLOT, bundle_frames=1, trace=True)


def pools(destinations: int) -> tuple[KVPool, list[KVPool]]:
    return randomise(KVPool.allocate(SPEC, BLOCKS), 1), [KVPool.allocate(SPEC, BLOCKS) for _ in range(destinations)]


def blocks(first: int, tokens: int) -> list[int]:
    return list(range(first, first + tokens // 16))


def packs(sender: Sender) -> list[int]:
    """Handles of the requests whose bundles were packed, in their order."""
    return [span[1] for span in sender.engine.take_trace() if span[0] == "pack"]


def ends(order: list[int], handles: Iterable[Handle]) -> list[float]:
    """When each one's last bundle was packed, as a share of all."""
    last = {handle: at + 1 for at, handle in enumerate(order)}
    return [last[one.handle] / len(order) for one in handles]


@pytest.mark.parametrize("buffers", [1, 2])
def test_a_busy_link_leaves_every_other_turn_to_the_others(buffers: int) -> None:
    """One link always has more to send, and its caller hands over more all the time; both need a staging buffer."""
    source, destinations = pools(2)
    config = TransferConfig(
        slot_bytes=SLOT, window_bytes=8 * SLOT, bundle_frames=1, trace=True, direct=False, staging_slots=buffers
    )
    with connected([source], destinations, config) as ([sender], [busy, quiet]):
        large = [sender.send(f"large-{at}", blocks(at * 256, BUSY_TOKENS), BUSY_TOKENS) for at in range(2)]
        asked = [busy.receive(f"large-{at}", blocks(at * 256, BUSY_TOKENS), BUSY_TOKENS) for at in range(2)]
        large[0].send_layers()
        over = threading.Event()

        def hand_over() -> None:
            for layer in range(4):
                for token in range(BUSY_TOKENS):
                    large[1].send_layer(layer, (token, token + 1))
            over.set()

        caller = threading.Thread(target=hand_over)
        caller.start()
        small = sender.send("small", blocks(900, TOKENS), TOKENS)
        small.send_layers()
        quiet.receive("small", blocks(0, TOKENS), TOKENS).wait(WAIT_S)
        caller.join()
        for handle in asked + large:
            handle.wait(WAIT_S)
        order = packs(sender)
        mine = [at for at, handle in enumerate(order) if handle == small.handle]
        between = mine[-1] - mine[0] + 1 - len(mine)
        print(f"{buffers} buffers: {between} of the busy link's among {len(mine)}")
        settled(sender, busy, quiet)
        assert between <= 3 * len(mine)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("links", [1, 2, 4])
def test_links_share_evenly_and_the_requests_of_each_end_one_after_another(links: int, direct: bool) -> None:
    """In one of several tries: a receiver whose thread has no core for a while returns no slots, and gets no share. Of
    four receivers on two cores some always have none, so there it is the ends alone that count."""
    # One after the other on each link, all links at once: 0.56, 0.62, 0.75.
    ideal = sum((turn + 1) * links for turn in range(8 // links)) * links / 64
    tries = []
    for _ in range(TRIES):
        mean, shares = shared_out(links, direct)
        tries.append((mean, shares))
        if mean < ideal + 0.12 and (links > 2 or min(shares) > 0.5 * max(shares)):
            return
    raise AssertionError(f"mean of ends of {ideal:.2f} at best, and each link's bundles in the first half: {tries}")


def shared_out(links: int, direct: bool) -> tuple[float, list[int]]:
    """Eight requests: the mean of their ends, and how many bundles each link had of the first half of all."""
    source, destinations = pools(links)
    config = TransferConfig(slot_bytes=SLOT, window_bytes=8 * SLOT, bundle_frames=1, trace=True, direct=direct)
    with connected([source], destinations, config) as ([sender], receivers):
        sent = [sender.send(f"{at}", blocks(at * 64, TOKENS), TOKENS) for at in range(8)]
        asked = [receivers[at % links].receive(f"{at}", blocks(at * 64, TOKENS), TOKENS) for at in range(8)]
        sender.batch(sent).send_layers()
        for handle in asked + sent:
            handle.wait(WAIT_S)
        order = packs(sender)
    half = Counter(order[: len(order) // 2])
    shares = [sum(half[sent[at].handle] for at in range(link, 8, links)) for link in range(links)]
    return sum(ends(order, sent)) / 8, shares


def test_a_small_request_does_not_wait_for_large_ones_of_its_link() -> None:
    source, destinations = pools(1)
    with connected([source], destinations, CONFIG) as ([sender], [receiver]):
        sent = [sender.send(f"{at}", blocks(at * 256, BUSY_TOKENS), BUSY_TOKENS) for at in range(3)]
        asked = [receiver.receive(f"{at}", blocks(at * 256, BUSY_TOKENS), BUSY_TOKENS) for at in range(3)]
        small = sender.send("small", blocks(900, 64), 64)
        asked.append(receiver.receive("small", blocks(900, 64), 64))
        sender.batch([*sent, small]).send_layers()
        for handle in asked:
            handle.wait(WAIT_S)
        assert ends(packs(sender), [small])[0] < 0.1


def test_requests_of_a_lower_priority_number_go_first() -> None:
    source, destinations = pools(1)
    with connected([source], destinations, CONFIG) as ([sender], [receiver]):
        numbers = [7, 0, -3, 7, 0, 2**31 - 1, -(2**31)]
        sent = [sender.send(f"{at}", blocks(at * 64, TOKENS), TOKENS, priority=n) for at, n in enumerate(numbers)]
        asked = [receiver.receive(f"{at}", blocks(at * 64, TOKENS), TOKENS) for at in range(len(numbers))]
        sender.batch(sent).send_layers()
        for handle in asked:
            handle.wait(WAIT_S)
        order = packs(sender)
        at = ends(order, sent)
        assert sorted(range(len(numbers)), key=at.__getitem__) == [6, 2, 1, 4, 0, 3, 5]


@pytest.mark.parametrize("priority", [1.5, "high", None, 2**31, -(2**31) - 1])
def test_what_is_no_priority_is_rejected(priority: object) -> None:
    with Sender(KVPool.allocate(SPEC, 4), secret=b"a secret of tests", instance="p") as sender:
        with pytest.raises(InputError, match="priority"):
            sender.send("request", [0], 16, priority=priority)  # type: ignore[arg-type]
        sender.send("request", [0], 16)
