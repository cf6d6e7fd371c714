"""Instances that are killed and start again under the same name and ports, under traffic of all to all (fleet.py)."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.transport.fleet import parse, run


def check(instances: int, kills: int, recovery: float) -> dict[str, Any]:
    ports = 20000 + os.getpid() % 200 * 50
    found = run(
        parse(
            [
                *("--instances", str(instances), "--kills", str(kills), "--steady", "2"),
                *("--recovery", str(recovery), "--ports", str(ports)),
            ]
        )
    )
    assert found["complete"] > 100
    assert found["wrong"] == found["hung"] == 0
    assert found["all_linked_again"]
    assert found["open_at_rest"] == found["exit_codes"] == [0] * instances
    return found


def test_every_request_ends_and_all_link_again() -> None:
    check(3, 3, 3)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_restarts_under_traffic() -> None:
    found = check(3, 50, 30)
    assert found["seconds_until_back"] is not None
