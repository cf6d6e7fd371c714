"""`hetkv probe`: what it finds by trying, under usual settings and under TCP alone, and between two of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hetkv.bench import probe
from hetkv.cli import main
from tests.control.authority import Authority

SECRET = "a secret for the tests"


def run(tmp_path: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """The JSON and the text of one probe in a process of its own: UCX reads its settings once."""
    out = tmp_path / "probe.json"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    command = [sys.executable, "-m", "hetkv", "probe", "--mib", "1", "--json", str(out)]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), " ".join(done.stdout.split())


def test_usual_settings(tmp_path: Path) -> None:
    found, text = run(tmp_path)
    assert found["ucx"].get("version", "none") in text
    assert found["local"]["auto"]["path"] == "shm"
    assert found["local"]["stream"]["path"] == "stream"
    for result in found["local"].values():
        assert result["gb_s"] > 0
        assert result["verified_bytes"] == 1 << 20
    assert found["cpu"]["isa"] in found["cpu"]["available_isas"]
    assert set(found["gpu"]) == {"cuda", "hip"}
    for name, gpu in found["gpu"].items():
        assert gpu["present"] == (not gpu["why_not"])
        assert name.upper() in text
    assert text.count("warning:") == len(found["warnings"])


@pytest.mark.parametrize("tls", [False, True])
def test_two_ends(tmp_path: Path, tls: bool) -> None:
    environment = {**os.environ, "HETKV_SECRET": SECRET}
    command = [sys.executable, "-m", "hetkv", "probe", "--mib", "1", "--timeout", "30", "--json"]
    ends: dict[str, list[str]] = {"listen": [], "connect": []}
    if tls:
        ca = Authority(tmp_path / "ca")
        for name, options in ends.items():
            own = ca.issue(name, "127.0.0.1")
            options += ["--tls-ca", str(own.ca), "--tls-certificate", str(own.certificate), "--tls-key", str(own.key)]
    listening = subprocess.Popen(
        [*command, str(tmp_path / "listen.json"), "--listen", "127.0.0.1:0", *ends["listen"]],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert listening.stdout is not None
        line = listening.stdout.readline()
        address = re.search(r"--connect (\S+)", line)
        assert address is not None
        assert SECRET not in line
        if tls:
            without = [*command, str(tmp_path / "none.json"), "--connect", address[1]]
            rejected = subprocess.run(without, env=environment, capture_output=True, text=True, timeout=60)
            assert rejected.returncode == 2
            assert "TLS" in rejected.stderr
        done = subprocess.run(
            [*command, str(tmp_path / "connect.json"), "--connect", address[1], *ends["connect"]],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert listening.wait(30) == 0
    finally:
        listening.kill()
        listening.communicate()
    connect, listen = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("connect", "listen"))
    assert connect["same_host"]
    assert listen["same_host"]
    assert connect["path"] == "shm"
    assert connect["streams"] == "unix"
    assert connect["gb_s"] > 0
    assert listen["gb_s"] > 0


def facts(**changes: Any) -> dict[str, Any]:
    """A host with nothing to warn of, but for `changes`."""
    return {
        "ucx": {"version": "1.22.0", "origin": "system", "has_verbs": True},
        "limits": {"rdma_devices": ["mlx5_0"], "memlock_bytes": None},
        "local": {"auto": {"path": "shm"}, "stream": {"path": "stream"}},
        "cpu": {"default_window_bytes": 32 << 20},
        **changes,
    }


def test_warnings_name_what_is_wrong() -> None:
    assert probe.warnings(facts()) == []
    (said,) = probe.warnings(facts(ucx={"version": "1.22.0", "origin": "wheel", "has_verbs": False}))
    assert said == "RDMA devices mlx5_0 are here, but cannot be used: the UCX of wheel has no verbs"
    (said,) = probe.warnings(facts(limits={"rdma_devices": ["mlx5_0"], "memlock_bytes": 64 << 10}))
    assert "64 KiB of memory can be locked" in said
    (said,) = probe.warnings(facts(local={"auto": {"path": "stream"}, "stream": {"path": "stream"}}))
    assert "do not share memory" in said
    failed = {"auto": {"error": "the sender: it broke"}, "stream": {"path": "stream"}}
    assert probe.warnings(facts(local=failed)) == ["two processes of this host, auto: the sender: it broke"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mib", "0"], "--mib 0"),
        (["--timeout", "-1"], "--timeout -1"),
        (["--connect", "127.0.0.1:1"], "HETKV_SECRET"),
        (["--listen", "no port"], "no port"),
        (["--listen", "127.0.0.1:0", "--tls-ca", "ca.pem"], "TLS needs --tls-ca and --tls-certificate"),
        (["--tls-ca", "ca.pem", "--tls-certificate", "a.pem"], "TLS is for --listen and --connect"),
    ],
)
def test_bad_input_is_one_line_and_2(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HETKV_SECRET", raising=False)
    assert main(["probe", *options]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
