"""Settings, secrets, versions, parameters and statistics: no engine needed."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hetkv.errors import BuildError, InputError
from hetkv.integrations.vllm import HetKVConnector
from hetkv.integrations.vllm.metrics import COUNTED, OBSERVED, HetKVPromMetrics, HetKVStats
from hetkv.integrations.vllm.params import consume, produce
from hetkv.integrations.vllm.settings import Settings
from hetkv.integrations.vllm.version import SUPPORTED, check_version


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.1rc2"])
def test_supported_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.4", "0.33.0", "1.0", "dev"])
def test_other_versions_are_rejected(version: str) -> None:
    with pytest.raises(BuildError) as rejected:
        check_version(version)
    assert SUPPORTED in str(rejected.value)
    assert version in str(rejected.value)


def test_piecewise_graphs_are_asked_for_by_the_setting_alone() -> None:
    assert not HetKVConnector.requires_piecewise_for_cudagraph({})
    assert HetKVConnector.requires_piecewise_for_cudagraph({"layerwise": True})


def test_own_secret_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HETKV_SECRET_FILE", raising=False)
    first = Settings().secret()
    assert len(first) == 64
    assert Settings().secret() == first
    made = tmp_path / "hetkv" / "secret"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert list(made.parent.iterdir()) == [made]


def test_secret_that_others_can_read_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("a secret of sixteen bytes or more")
    path.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        Settings(secret_file=str(path)).secret()
    path.chmod(0o600)
    assert Settings(secret_file=str(path)).secret() == b"a secret of sixteen bytes or more"
    path.write_text("short")
    with pytest.raises(InputError, match="5 bytes"):
        Settings(secret_file=str(path)).secret()


def test_several_hosts_need_a_secret_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETKV_SECRET_FILE", raising=False)
    with pytest.raises(InputError, match="secret_file"):
        Settings(host="10.0.0.1").secret()


@pytest.mark.parametrize(
    ("extra", "said"),
    [({"ports": 1}, "ports"), ({"port": 70000}, "70000"), ({"transfer": {"slot_bytes": 0}}, "slot_bytes")],
)
def test_wrong_settings(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Settings.parse(extra)


def test_addresses_by_rank() -> None:
    assert Settings(host="10.0.0.1", port=7000).address(3) == "10.0.0.1:7003"
    assert Settings(host="::1").address(3) == "[::1]:0"


def test_params_of_other_routers() -> None:
    """Fields that other connectors put there are ignored, absent ones have defaults."""
    nulls = {"remote_engine_id": None, "remote_block_ids": None, "remote_host": None, "remote_port": None}
    order = produce({"do_remote_decode": True, "do_remote_prefill": False, **nulls})
    assert order is not None
    assert (order.transfer_id, order.rendezvous, order.describe) == (None, "prefill_first", False)
    assert produce({"do_remote_decode": False}) is None
    assert consume(None) is None


@pytest.mark.parametrize("addresses", [[], ["host"], ["host:0x1"], ["h:1"] * 2000, "h:1", [7]])
def test_addresses_that_cannot_be(addresses: Any) -> None:
    params = {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "e", "remote_addresses": addresses}
    with pytest.raises(InputError):
        consume(params)


def test_statistics_add_up_and_reach_prometheus() -> None:
    total = HetKVStats()
    for worker in range(2):
        stats = HetKVStats()
        stats.add("loads")
        stats.observe("load_seconds", 0.25 + worker)
        taken = stats.take()
        assert taken is not None
        assert stats.take() is None
        total = total.aggregate(HetKVConnector.build_kv_connector_stats(taken.to_dict()))
    assert total.reduce() == {**dict.fromkeys(COUNTED, 0), "loads": 2, "mean load_seconds": 0.75}

    registry = CollectorRegistry()
    types = {kind: lambda kind=kind, **how: kind(registry=registry, **how) for kind in (Counter, Gauge, Histogram)}
    config = type("Config", (), {"kv_transfer_config": None})()
    metrics = HetKVPromMetrics(config, types, ["engine"], {0: ["0"]})
    metrics.observe(total.data)
    labels = {"engine": "0"}
    assert registry.get_sample_value("vllm:hetkv_loads_total", labels) == 2
    assert registry.get_sample_value("vllm:hetkv_load_seconds_sum", labels) == 1.5
    for name in OBSERVED:
        assert registry.get_sample_value(f"vllm:hetkv_{name}_count", labels) is not None
