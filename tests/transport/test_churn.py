"""Transfers between real processes under kills, corrupt messages and leases that run out (churn.py)."""

from __future__ import annotations

import pytest

from tests.transport.churn import churn


def check(transfers: int, rate: float) -> None:
    found = churn(transfers, rate=rate)
    counts = found["counts"]
    assert counts.get("wrong", 0) == 0
    assert counts.get("past the deadline", 0) == 0
    assert counts["accepted"] > transfers / 2
    for fault in ("kill", "corrupt", "lease"):
        assert counts[f"rounds with {fault}"] > 0
    assert found["untouched"]
    assert not any(sum(held.values()) for held in found["senders_hold"])
    before, after = found["before"], found["after"]
    assert after["descriptors"] <= before["descriptors"] + 2
    assert after["threads"] <= before["threads"] + 2
    assert after["resident_mib"] <= before["resident_mib"] + 64


def test_every_accepted_request_is_right_and_nothing_is_left() -> None:
    check(400, 0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_thousand_transfers_under_faults() -> None:
    check(5000, 0.01)
