"""Settings, secrets, versions, parameters and statistics: no engine needed."""

from __future__ import annotations

import base64
import json
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hetkv.control.payloads import MAX_PAYLOAD_BYTES
from hetkv.errors import BuildError, InputError
from hetkv.integrations.vllm import HetKVConnector
from hetkv.integrations.vllm.limits import PARALLEL, check_config
from hetkv.integrations.vllm.metrics import COUNTED, OBSERVED, HetKVPromMetrics, HetKVStats
from hetkv.integrations.vllm.params import consume, produce
from hetkv.integrations.vllm.preflight import check_command_line
from hetkv.integrations.vllm.settings import Settings
from hetkv.integrations.vllm.version import SUPPORTED, check_version
from tests.vllm.engines import checkpoint


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
    first = Settings().secret().accepted()
    assert [len(secret) for secret in first] == [64]
    assert Settings().secret().accepted() == first
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
    assert Settings(secret_file=str(path)).secret().accepted() == (b"a secret of sixteen bytes or more",)
    path.write_text("short")
    with pytest.raises(InputError, match="5 bytes"):
        Settings(secret_file=str(path)).secret()


def test_tls_is_a_table_of_files(tmp_path: Path) -> None:
    files = {"ca": str(tmp_path / "ca.pem"), "certificate": "own.pem"}
    found = Settings.parse({"tls": {**files, "peers": ["spiffe://cluster/decode/*"]}}).tls
    assert found is not None
    assert (found.ca, found.key, found.peers) == (files["ca"], None, ("spiffe://cluster/decode/*",))
    for wrong in ({"ca": "x"}, {**files, "cert": "x"}, {**files, "peers": ["*"]}):
        with pytest.raises(InputError, match="tls"):
            Settings.parse({"tls": wrong})
    with pytest.raises(InputError, match=r"ca\.pem: No such file"):  # before a model is loaded
        check_command_line(line({"tls": files}))


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


@pytest.mark.parametrize("payload", ["no base64!", "AAA", 3, base64.b64encode(bytes(MAX_PAYLOAD_BYTES + 1)).decode()])
def test_what_is_no_payload_is_rejected(payload: Any) -> None:
    with pytest.raises(InputError, match="payload"):
        produce({"do_remote_decode": True, "payload": payload})


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


def line(extra: Any = None, role: str = "kv_producer", connector: str = "HetKVConnector") -> list[str]:
    """A server's command line."""
    config = {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": extra or {}}
    if connector == "HetKVConnector":
        config["kv_connector_module_path"] = "hetkv.integrations.vllm"
    return ["vllm", "serve", "m", "--kv-transfer-config", json.dumps(config), "--port", "1"]


def test_command_line_is_checked_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong secret, a taken port, a foreign host, a host without a secret, an unknown key: each by its name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HETKV_SECRET_FILE", raising=False)
    secret = tmp_path / "secret"
    secret.write_text("a secret of sixteen bytes or more")
    secret.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for extra, text in (
            ({"secret_file": str(tmp_path / "none")}, "No such file"),
            ({"host": "10.0.0.1"}, "set secret_file"),
            ({"port": port}, f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            ({"host": "192.0.2.1", "secret_file": str(secret)}, "cannot listen on 192.0.2.1:0"),
            ({"prot": 7000}, "prot"),
        ):
            with pytest.raises(InputError, match=re.escape(text)):
                check_command_line(line(extra))
        check_command_line(line({"port": port}, role="kv_consumer"))  # a consumer does not listen
    check_command_line(line({"port": port, "secret_file": str(secret)}))
    joined = line({"prot": 7000})
    with pytest.raises(InputError, match="prot"):
        check_command_line([f"{joined[3]}={joined[4]}"])


def test_command_lines_of_others_are_left_alone() -> None:
    for arguments in ([], ["--kv-transfer-config"], ["--kv-transfer-config", "{"], ["--kv-transfer-config", "7"],
                      line({"prot": 1}, connector="NixlConnector")):  # fmt: skip
        check_command_line(arguments)


def test_multi_connector_is_rejected_by_name() -> None:
    children = [json.loads(line()[4]), {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}]
    with pytest.raises(InputError, match="HetKVConnector inside MultiConnector"):
        check_command_line(line({"connectors": children}, connector="MultiConnector"))
    check_command_line(line({"connectors": children[1:]}, connector="MultiConnector"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pipeline-parallel-size", "2"], "pipeline_parallel_size is 2"),
        (["-pp=2"], "pipeline_parallel_size is 2"),
        (["--data_parallel_size=4"], "data_parallel_size is 4"),
        (["-dcp", "2"], "decode_context_parallel_size is 2"),
        (["--speculative-config", "{}"], "speculative decoding"),
    ],
)
def test_what_is_not_served_is_rejected_by_name(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_command_line(line() + arguments)
    check_command_line(arguments)  # without this connector
    check_command_line([*line(), "-pp", "1", "-dp", "x"])
    check_command_line([*line(), "-dp", "\u00b2"])  # a digit that is no number


def test_a_configuration_that_is_not_served_is_rejected_by_name() -> None:
    def config(speculative: Any = None, sleep: bool = False, **sizes: int) -> Any:
        parallel = SimpleNamespace(**{**dict.fromkeys(PARALLEL, 1), **sizes})
        model = SimpleNamespace(enable_sleep_mode=sleep)
        return SimpleNamespace(parallel_config=parallel, speculative_config=speculative, model_config=model)

    check_config(config(), sleeps=False)
    check_config(config(sleep=True), sleeps=True)
    for field in PARALLEL:
        with pytest.raises(InputError, match=f"{field} is 2: this connector takes 1"):
            check_config(config(**{field: 2}), sleeps=True)
    with pytest.raises(InputError, match="speculative decoding"):
        check_config(config(speculative=object()), sleeps=True)
    with pytest.raises(InputError, match=r"sleep mode needs vLLM 0\.33"):
        check_config(config(sleep=True), sleeps=False)


def test_server_with_a_wrong_secret_ends_at_once(models: Path, tmp_path: Path) -> None:
    """Before any worker is started: the process that says so has loaded no model."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint(models)]
    extra = {"secret_file": str(tmp_path / "none")}
    command += ["--skip-tokenizer-init", "--enforce-eager", *line(extra)[3:5]]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert found.returncode != 0
    output = found.stdout + found.stderr
    assert f"secret file {tmp_path / 'none'}: No such file or directory" in output
    assert "Loading safetensors" not in output
    assert "EngineCore" not in output
