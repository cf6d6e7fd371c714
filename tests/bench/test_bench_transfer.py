"""`hetkv bench transfer`: small runs over real processes; what its JSON says; peers that are absent; bad input."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hetkv.bench import peers, ucx
from hetkv.bench.pair import Pair, Shape
from hetkv.cli import main
from hetkv.errors import BenchmarkError, HetkvError, InputError
from hetkv.transport.config import TransferConfig


def has_perftest() -> bool:
    try:
        ucx.tool("ucx_perftest")
    except HetkvError:
        return False
    return True


needs_perftest = pytest.mark.skipif(not has_perftest(), reason="ucx_perftest is not installed")


@needs_perftest
def test_small_run_writes_every_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)  # no adapter there: all peers are absent, and said to be
    out = tmp_path / "transfer.json"
    command = "bench transfer --layers 2 --layer-mib 0.5 --rounds 2 --reps 2 --to rocm:32 --peers nixl --json"
    assert main([*command.split(), str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["ucx"]["settings"] == ucx.SETTINGS
    assert report["ucx"]["version"].count(".") == 2
    assert report["device"]
    assert report["versions"]["hetkv"]
    assert "commit" in report
    assert report["targets"]["ratio_ucx"] == 0.45
    assert [row["direct"] for row in report["results"]] == [True, False]
    for row in report["results"]:
        assert (row["block_kib"], row["layer_mib"], row["layers"]) == (32, 0.5, 2)
        assert (row["source"], row["destination"]) == ("nhd:16", "rocm:32")
        assert row["verified_bytes"] == 1 << 20
        for name in ("hetkv_gb_s", "ucx_gb_s"):
            assert 0 < min(row[f"{name}_rounds"]) <= row[name] <= max(row[f"{name}_rounds"]), name
        assert row["ratio_ucx"] == pytest.approx(row["hetkv_gb_s"] / row["ucx_gb_s"], rel=0.05, abs=1e-3)
        assert row["peers"]["nixl"]["error"].startswith(str(tmp_path))
        assert row["ratio_nixl"] is None
        assert row["send_layer_us"] > 0
    assert report["results"][1]["path"] == "stream"


def test_resharded_and_unsharded(tmp_path: Path) -> None:
    out = tmp_path / "transfer.json"
    command = (
        "bench transfer --layers 2 --layer-mib 0.5 --rounds 2 --reps 1 --to hnd:32 --path auto --peers none --tp 2:3"
    )
    assert main([*command.split(), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [(row["tp"], row["processes"]) for row in rows] == [([1, 1], "rank"), ([2, 3], "rank"), ([2, 3], "side")]
    for row in rows:
        assert row["verified_bytes"] == 1 << 20, "the same bytes, whatever the ranks"
        assert row["ratio_unsharded"] == pytest.approx(row["hetkv_gb_s"] / rows[0]["hetkv_gb_s"], rel=0.05, abs=2e-3)
        assert len(row["ratio_unsharded_rounds"]) == 2
        assert row["cpu_s_per_gb"] > 0
    assert rows[0]["ratio_unsharded"] == 1
    assert [len(row["idle_cpu_percent"]) for row in rows] == [2, 5, 2], "a process for each rank, or for each side"
    lines = figures_module().resharded_table(out).splitlines()
    assert len(lines) == 2 + len(rows)
    assert f"| hnd:32 | 2 to 3 | one a side | shm | {rows[2]['hetkv_gb_s']:.2f} |" in lines[4]


def figures_module() -> Any:
    spec = importlib.util.spec_from_file_location("figures", Path(__file__).parents[2] / "bench" / "figures.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def test_an_absent_peer_names_the_line_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nixl_peer.py").touch()
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    monkeypatch.setitem(peers.PEERS, "nixl", peers.Peer("no_such_module", "pip install no-such-wheel"))
    why = peers.absent("nixl", sys.executable)
    assert why is not None
    assert "no_such_module" in why
    assert "pip install no-such-wheel" in why


def test_a_peer_that_breaks_is_an_error_not_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    size = {"layers": 1, "layer_mib": 1, "block_kib": 32, "reps": 1}
    (tmp_path / "nixl_peer.py").write_text("raise SystemExit('lost its way')")
    assert peers.measure("nixl", sys.executable, **size) == {"error": "exit code 1: lost its way"}
    (tmp_path / "nixl_peer.py").write_text("""print('{"error": "no route"}')""")
    assert peers.measure("nixl", sys.executable, **size) == {"error": "no route"}


@pytest.mark.skipif(not (peers.SCRIPTS / "nixl_peer.py").exists(), reason="the adapters are not in this tree")
@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_that_are_here_run(name: str) -> None:
    if why := peers.absent(name, sys.executable):
        pytest.skip(why)
    found = peers.measure(name, sys.executable, layers=1, layer_mib=1, block_kib=32, reps=1)
    assert found["gb_s"] == max(found["variants"].values()) > 0
    assert found["version"]
    assert "block" in found["how"]


def test_verify_sees_a_pool_that_differs() -> None:
    with Pair(Shape(1, 100, destination=("hnd", 64)), TransferConfig(slot_bytes=1 << 16)) as pair:
        pair.send()
        assert pair.receivers[0].ask("verify") == 2 * 100 * 2048
        pair.receivers[0].ask("clear")
        with pytest.raises(BenchmarkError, match="differs from the sender's"):
            pair.receivers[0].ask("verify")


def test_a_child_that_dies_is_reported() -> None:
    with Pair(Shape(1, 16)) as pair:
        pair.senders[0].process.kill()
        with pytest.raises(BenchmarkError, match="the sender ended with exit code -9"):
            pair.send()


@needs_perftest
def test_perftest_failure_is_one_line() -> None:
    with pytest.raises(ucx.UcxToolError, match="ucx_perftest"):
        ucx.put_gb_s(1 << 16, 4, settings={"UCX_TLS": "no_such_transport"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--block-kib", "3"], "--block-kib 3"),
        (["--layer-mib", "0.01"], "--layer-mib 0.01"),
        (["--layers", "0"], "--layers 0"),
        (["--to", "hnd"], "--to hnd"),
        (["--to", "diagonal:16"], "diagonal"),
        (["--peers", "carrier-pigeon"], "carrier-pigeon"),
        (["--peer-python", "nixl=/no/such/python"], "/no/such/python"),
        (["--slot-bytes", "0"], "slot_bytes"),
        (["--tp", "2"], "--tp 2"),
        (["--tp", "9:1"], "--tp 9:1"),
    ],
)
def test_bad_input_is_one_line_and_2(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "transfer", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_settings_are_checked_before_any_process_starts() -> None:
    with pytest.raises(InputError, match="0 layers"):
        Pair(Shape(0, 16))
