"""`hetkv doctor`: lanes that work, a lane that does not, and what it advises; `hetkv bench network`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetkv.bench import doctor, namespaces
from hetkv.bench.doctor import Lane
from hetkv.cli import main

FINE: dict[str, Any] = {
    "lanes": {name: {"works": True} for name in doctor.REMEDIES},
    "ucx": {"error": "none"},
    "limits": {
        "rdma_devices": [], "dev_shm": {"bytes": 1 << 30, "free_bytes": 1}, "memlock_bytes": None, "open_files": 65536,
    },
    "namespaces": {"container": False},
    "ipv6": True,
}  # fmt: skip


def test_this_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(out)]) == 0
    found, text = json.loads(out.read_text()), " ".join(capsys.readouterr().out.split())
    for name in ("shm", "unix socket", "tcp"):
        assert found["lanes"][name]["works"], found["lanes"][name]
        assert found["lanes"][name]["verified_bytes"] == doctor.SHAPE.payload_bytes
        assert f"lane {name} works" in text
    for name in ("device", "rma"):
        assert found["lanes"][name]["works"] or found["lanes"][name]["why_not"] in text
    assert text.count("change:") == len(found["advice"])


def test_a_lane_that_payloads_do_not_take_does_not_work() -> None:
    found = doctor.prove(Lane("shm", "shm", doctor.CONFIG, doctor.ONLY_TCP))
    assert found == {"works": False, "why_not": "payloads went by stream"}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "lane": ({"lanes": {**FINE["lanes"], "shm": {"works": False, "why_not": "X"}}}, "lane shm does not work: X. memfd"),
    "shm": ({"limits": {**FINE["limits"], "dev_shm": {"bytes": 1 << 20, "free_bytes": 0}}}, "docker run --shm-size"),
    "verbs": ({"limits": {**FINE["limits"], "rdma_devices": ["mlx5_0"]}}, "mlx5_0 are idle: none. Install a UCX"),
    "memlock": (
        {
            "limits": {**FINE["limits"], "rdma_devices": ["mlx5_0"], "memlock_bytes": 1 << 16},
            "ucx": {"has_verbs": True},
        },
        "at most 64 KiB can be locked",
    ),
    "files": ({"limits": {**FINE["limits"], "open_files": 1024}}, "ulimit -n 4096"),
    "container": ({"namespaces": {"container": True}}, "HETKV_SOCKET_DIR"),
    "IPv6": ({"ipv6": False}, "IPv4"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_advice(name: str) -> None:
    assert doctor.advice(FINE) == []
    change, said = CHANGES[name]
    [line] = doctor.advice({**FINE, **change})
    assert said in line


@pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not() or "there are namespaces")
def test_network(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    options = ["--layers", "2", "--rounds", "2", "--connections", "2", "--encrypt"]
    assert main(["bench", "network", *options, "--json", str(out)]) == 0
    [row] = json.loads(out.read_text())["results"]
    assert (row["path"], row["connections"], row["mib"]) == ("stream", 2, 32)
    assert row["verified_bytes"] == 32 << 20
    assert len(row["ratio_rounds"]) == len(row["encrypted"]["of_clear_rounds"]) == 2
    assert row["encrypted"]["cipher"] in ("aes-256-gcm", "chacha20-poly1305")
