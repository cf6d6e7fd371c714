"""How requests live and end: ids, arguments, waits, leases, close; and that nothing is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch

from hetkv.errors import ClosedError, InputError, LeaseExpiredError, PeerLostError, WaitTimeoutError
from tests.transport.peers import (
    WAIT_S,
    check_transfer,
    connected,
    duplicate,
    pick_blocks,
    settled,
    until,
)
from tests.transport.test_transfer import SMALL, pools


def test_equal_ids_are_rejected_while_under_way() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        tx, rx = sender.send("id", [1], 16), receiver.receive("id", [1], 16)
        with pytest.raises(InputError, match="under way"):
            sender.send("id", [2], 16)
        with pytest.raises(InputError, match="under way"):
            receiver.receive("id", [2], 16)
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        check_transfer(source, destination, sender, receiver, 16, request="id")


def test_bad_arguments_change_nothing() -> None:
    source, destination = pools()
    before = duplicate(destination)
    with connected([source], [destination]) as ([sender], [receiver]):
        for ids, why in (
            ([1, 1], "twice"),
            ([0, 24], "range"),
            ([-1, 0], "range"),
            ([0, 1 << 40], "range"),
            ([0], "need"),
        ):
            with pytest.raises(InputError, match=why):
                receiver.receive("bad", ids, 32)
            if why != "need":
                with pytest.raises(InputError, match=why):
                    sender.send("bad", ids, 32)
        for ids in ([1.5], ["a"], [[0], [1]], [None]):
            with pytest.raises(InputError):
                sender.send("bad", ids, 8)
        for count in (0, -3, 1.5, [3, 4]):
            with pytest.raises(InputError):
                receiver.receive("bad", [0], count)
        for seconds in (0, -1, float("nan"), 1e9):
            with pytest.raises(InputError):
                receiver.receive("bad", [0], 8, lease_s=seconds)
            with pytest.raises(InputError):
                sender.send("bad", [0], 8, hold_s=seconds)
        with pytest.raises(InputError):
            receiver.receive("bad", [0], 8, num_cached_tokens=9)
        with pytest.raises(PeerLostError, match="not connected"):
            receiver.receive("bad", [0], 8, src_instance="nobody")
        tx = sender.send("good", np.array([3]), np.int64(8))
        for layer in (-1, 2):
            with pytest.raises(InputError):
                tx.send_layer(layer)
        rx = receiver.receive("good", torch.tensor([5]), torch.tensor(8))
        tx.send_layer(0)
        tx.send_layer(0, (4, 8))
        with pytest.raises(InputError, match="sent before"):
            tx.wait(WAIT_S)
        with pytest.raises(InputError, match="sent before"):
            rx.wait(WAIT_S)
        settled(sender, receiver)
    for layer in (0, 1):
        for name in "kv":
            kept = [n for n in range(24) if n != 5]
            assert torch.equal(
                destination.view(layer, name)[kept].view(torch.int16), before.view(layer, name)[kept].view(torch.int16)
            )


def test_a_receiver_that_has_everything_counts_before_the_send() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        receiver.receive("cached", [1], 16, num_cached_tokens=16).wait(WAIT_S)
        until(lambda: sender.stats()["pending_tickets"] == 1)
        sender.send("cached", [1], 16).wait(WAIT_S)
        assert sender.stats()["frames"] == 0
        settled(sender, receiver)


def test_a_later_ticket_takes_the_place_of_an_earlier_one() -> None:
    """The first one's receiver had everything and has ended: what the second one asks for is sent all the same."""
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        receiver.receive("twice", [1], 16, num_cached_tokens=16).wait(WAIT_S)
        rx = receiver.receive("twice", [1], 16)
        last = receiver.receive("last", [2], 16)  # its ticket comes after theirs
        until(lambda: sender.stats()["pending_tickets"] == 2)
        tx, other = sender.send("twice", [1], 16), sender.send("last", [2], 16)
        for handle in (tx, other):
            handle.send_layers()
        for handle in (rx, last, tx, other):
            handle.wait(WAIT_S)
        settled(sender, receiver)


def test_cancelling_a_wait_leaves_the_request() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):

        async def run() -> None:
            rx, tx = receiver.receive("async", [4], 16), sender.send("async", [2], 16)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(rx, 0.05)
            task = asyncio.ensure_future(rx)
            await asyncio.sleep(0.01)
            task.cancel()
            assert not rx.future.cancel()
            assert not rx.done()
            tx.send_layers()
            await asyncio.gather(rx, tx)
            failing = receiver.receive("fails", [4], 16, lease_s=0.05)
            with pytest.raises(LeaseExpiredError):
                await failing

        asyncio.run(run())
        with pytest.raises((CancelledError, WaitTimeoutError)):
            receiver.receive("waits", [4], 16).wait(0.01)


def test_leases_end_on_either_side() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        tx = sender.send("nobody asks", [0], 16, hold_s=0.05)
        with pytest.raises(LeaseExpiredError, match="no receiver"):
            tx.wait(WAIT_S)
        rx, tx = receiver.receive("slow", [0], 16, lease_s=0.1), sender.send("slow", [0], 16)
        tx.send_layer(0)
        with pytest.raises(LeaseExpiredError):
            rx.wait(WAIT_S)
        with pytest.raises(LeaseExpiredError, match="receiver gave"):
            tx.wait(WAIT_S)
        rx, tx = receiver.receive("slow", [0], 16), sender.send("slow", [0], 16, hold_s=0.1)
        tx.send_layer(0)
        with pytest.raises(LeaseExpiredError):
            tx.wait(WAIT_S)
        with pytest.raises(LeaseExpiredError, match="sender gave"):
            rx.wait(WAIT_S)
        check_transfer(source, destination, sender, receiver, 100, request="slow")
        settled(sender, receiver)


def test_close_ends_requests_and_may_come_from_a_callback() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        rx, tx = receiver.receive("open", [0], 16), sender.send("open", [0], 16)
        closed = threading.Event()
        rx.future.add_done_callback(lambda _: (receiver.close(), closed.set()))
        sender.close()
        with pytest.raises(ClosedError):
            tx.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)
        assert closed.wait(WAIT_S)
        with pytest.raises(ClosedError):
            sender.send("late", [0], 16)
        tx.send_layer(0)
        tx.abort()


def resident_kib() -> int:
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")).split()[1])


def test_five_hundred_requests_leak_nothing() -> None:
    source, destination = pools()
    generator = torch.Generator().manual_seed(1)
    with connected([source], [destination], SMALL) as ([sender], [receiver]):

        def run(first: int, count: int) -> None:
            for base in range(first, first + count, 25):
                pending = []
                for number in range(base, base + 25):
                    tx = sender.send(f"{number}", pick_blocks(source, [90], generator)[0], 90)
                    tx.send_layers()
                    pending += [tx, receiver.receive(f"{number}", pick_blocks(destination, [90], generator)[0], 90)]
                    if number % 5 == 0:
                        pending.pop().abort()
                        pending.pop().abort()  # one that had not met its ticket yet would be held for another
                for request in pending:
                    request.wait(WAIT_S)

        run(0, 100)
        settled(sender, receiver)
        gc.collect()
        before = len(os.listdir("/proc/self/fd")), threading.active_count(), resident_kib()
        run(1000, 500)
        settled(sender, receiver)
        gc.collect()
        after = len(os.listdir("/proc/self/fd")), threading.active_count(), resident_kib()
        assert after[:2] == before[:2]
        assert after[2] - before[2] < 20_000, "KiB"
        assert sender.stats()["quarantined_slots"] == receiver.stats()["quarantined_slots"] == 0
