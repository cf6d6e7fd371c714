"""Rank processes end with the demo: at Ctrl-C and SIGTERM, when a rank is killed, when the demo itself is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hetkv.errors import HetkvError, InputError, PeerLostError
from hetkv.runtime.demo import MODEL
from hetkv.runtime.plan import InstancePlan
from hetkv.runtime.processes import Instance, link, running
from tests.runtime.deployment_cases import POOLS

PROMPT = list(range(2, 90))
PAIR = [
    InstancePlan(name="prefill-0", role="prefill", tp=2, pool=POOLS["prefill"]),
    InstancePlan(name="decode-0", role="decode", pp=2, pool=POOLS["decode"]),
]
RANKS = 6


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def session(leader: int) -> list[int]:
    """Processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rsplit(")", 1)[1].split()[:4]
            if int(number) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@contextlib.contextmanager
def command(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that would run for long: two prefill instances of two ranks, one decode instance of two."""
    root = str(Path(__file__).parents[2])
    options = ["--prefill", "2xTP2", "--decode", "TP1PP2", "--tokens", "800", "--requests", "20"]
    with subprocess.Popen(
        # Tests that run in the background ignore Ctrl-C, and so would their children.
        ["env", "--default-signal=INT", sys.executable, "-m", "hetkv", "demo", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    ) as process:
        try:
            yield process
        finally:
            for pid in session(process.pid):
                os.kill(pid, signal.SIGKILL)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("ucx")}


@pytest.mark.parametrize(
    ("number", "processes", "status"),
    [
        pytest.param(signal.SIGINT, 2, 130, id="Ctrl-C while it starts"),
        pytest.param(signal.SIGINT, 2 + RANKS, 130, id="Ctrl-C while it runs"),
        pytest.param(signal.SIGTERM, 2 + RANKS, 143, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_every_process(number: signal.Signals, processes: int, status: int, tmp_path: Path) -> None:
    before = shared_memory()
    with command(tmp_path) as demo:
        until(lambda: len(session(demo.pid)) >= processes)
        time.sleep(1)
        if number == signal.SIGINT:
            os.killpg(demo.pid, number)  # as the terminal does: to all of them
        else:
            demo.send_signal(number)
        assert demo.wait(60) == status
        until(lambda: not session(demo.pid), seconds=20)
        assert "Traceback" not in demo.communicate()[1]
    assert list(tmp_path.iterdir()) == []
    until(lambda: shared_memory() <= before)


def test_ranks_end_when_the_demo_is_killed(tmp_path: Path) -> None:
    with command(tmp_path) as demo:
        until(lambda: len(session(demo.pid)) >= 2 + RANKS)
        time.sleep(1)
        demo.kill()
        until(lambda: not session(demo.pid), seconds=10)


def until_the_end(pids: list[int], model: Path, max_tokens: int, work: Callable[[Instance, Instance], None]) -> None:
    """Run `work` on a pair of instances; `pids` receives the ids of their ranks."""
    with running(PAIR, model=str(model), max_tokens=max_tokens, chunk=1) as (source, destination):
        pids += source.pids + destination.pids
        link([source, destination])
        work(source, destination)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_ends_all(role: str, rank: int) -> None:
    """Killed while all ranks of its instance are at work."""
    pids: list[int] = []

    def work(source: Instance, destination: Instance) -> None:
        victim = (source if role == "prefill" else destination).pids[rank]
        kill = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
        if role == "prefill":
            kill.start()
            source.call("prefill", "long", list(range(2, 900)))  # in chunks of one token
        destination.call("accept", "long", source.plan.name, len(PROMPT), 800)
        token = source.call("prefill", "long", PROMPT)[0].first_token
        kill.start()
        destination.call("decode", "long", token, 800)

    with pytest.raises(PeerLostError, match=rf"rank {role}-0/{rank} was killed by SIGKILL"):
        until_the_end(pids, MODEL, 900, work)
    assert len(pids) == 4
    assert not any(map(alive, pids))


def test_an_error_of_one_rank_is_reported_and_ends_all(tmp_path: Path) -> None:
    pids: list[int] = []
    with pytest.raises(InputError, match=r"prefill-0/[01]: .*no such checkpoint directory"):
        until_the_end(pids, tmp_path / "absent", 100, lambda *_: None)
    assert len(pids) == 4
    assert not any(map(alive, pids))


def test_a_failed_call_ends_all() -> None:
    pids: list[int] = []
    with pytest.raises(HetkvError, match=r"prefill-0/[01]: 88 tokens need 6 blocks of 16 .* 4 are free"):
        until_the_end(pids, MODEL, 10, lambda source, _: source.call("prefill", "too long", PROMPT))
    assert not any(map(alive, pids))
