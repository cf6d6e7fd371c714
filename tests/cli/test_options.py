"""Bad options and outputs end in one line and exit status 2, before any work; `--json -` is standard output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetkv.cli import main


def hetkv(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", "hetkv", *arguments],
        capture_output=True, text=True, timeout=120, cwd=cwd, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(("words", "line"), [
    ("demo --plot x.foo", "--plot x.foo: the file name must end in .png, .svg, .pdf"),
    ("demo --plot no/such.png", "--plot no/such.png: there is no folder no"),
    ("demo --plot -", "--plot -: give a file; only --json writes to standard output"),
    ("demo --json .", "--json .: a folder, where a file is written"),
    ("simulate --plan x --rate 1 --plot y.foo", "--plot y.foo: the file name must end in .png, .svg, .pdf"),
    ("plan --problem x --trace y --trace-plot z.foo", "--trace-plot z.foo: the file name must end in .png, .svg, .pdf"),
    ("plan --problem x.yaml --rate 96 --budget -4", "--rate, --budget: not with --problem x.yaml"),
    ("plan --problem x.yaml --gpu H100:2", "--gpu: not with --problem x.yaml"),
    ("plan --problem x.yaml --spare 0", "--spare: not with --problem x.yaml"),
    ("plan --problem x.yaml --model llama-3-70b", "--model: not with --problem x.yaml"),
    ("probe --mib nan", "--mib nan: more than 0, at most 4096"),
    ("proxy --prefill http://a --decode b:1", "'b:1' is not a URL: write http://host:port"),
    ("loadtest --rate 1 --url a:1", "--url a:1: write http://host:port"),
    ("loadtest --rate 1 --url http://127.0.0.1:9 --requests 1", "http://127.0.0.1:9: Cannot connect"),
    ("loadtest --rate 1 --concurrency 0", "--concurrency must be at least 1, not 0"),
    ("loadtest --clients 3", "--clients: a load test has no closed loop"),
    ("loadtest", "give one of --trace, --rate and --clients"),
    ("bench transfer --device cuda:0,cuda:99", "device cuda:"),
])  # fmt: skip
def test_one_line_before_the_work(
    words: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"hetkv {words.split()[0]}: {line}")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_json_to_standard_output(tmp_path: Path) -> None:
    done = hetkv("bench", "remap", "--only", "nhd 16 -> canonical, bf16", "--repeats", "2", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]
    assert "memcpy GB/s" in done.stderr  # the table
    assert not list(tmp_path.iterdir())


PLAN = (
    "plan --model llama-3-70b --gpu H100-SXM:2 --rate 20 --ttft 2000 --tpot 50 --prices-as-of 2026-01-01 --jobs 2 "
    "--rates 0.25,0.5,1,2,3,4,5,6,7,8 --plot plan.svg"
)


@pytest.mark.parametrize("words", ["probe --mib 64", "bench transfer --peers none --rounds 99", PLAN])
def test_ctrl_c_prints_no_traceback(words: str, tmp_path: Path) -> None:
    """As a terminal sends it: to the command and all processes that it started."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = subprocess.Popen(
        [sys.executable, "-m", "hetkv", *words.split()],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    deadline = time.monotonic() + 60
    while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert command.poll() is None, command.communicate()
    os.killpg(command.pid, signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert "Traceback" not in out + err
