"""The page at `/ui`, in a real headless browser where there is one, and the spans of requests in a Perfetto file."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from hetkv.runtime.rank import Moved
from hetkv.serve.messages import Trace
from hetkv.serve.page import Moves
from tests.serve.browser import Browser
from tests.serve.serving import QUICK, Serving, serving

SHELLS = ("chromium-headless-shell", "chromium", "google-chrome")
PROMPT = {"model": "tiny", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def traced(checkpoint: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server that records layers, after two requests."""
    folder = tmp_path_factory.mktemp("traced")
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", *QUICK, "--timeline"]
    with serving(folder / "log", options) as server:
        for number in range(2):
            body = {**PROMPT, "prompt": [number + 5] * 40}
            assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
        yield server


def state_of(server: Serving, seconds: float = 10.0) -> dict[str, Any]:
    """What the page shows, once instances have reported a transfer."""
    deadline = time.monotonic() + seconds
    while True:
        state: dict[str, Any] = httpx.get(server.url + "/ui/state").json()
        if state["moves"] or time.monotonic() > deadline:
            return state
        time.sleep(0.1)


def test_state(traced: Serving) -> None:
    state = state_of(traced)
    assert [one["role"] for one in state["instances"]] == ["prefill", "decode"]
    assert all(one["up"] and one["requests"] == 0 for one in state["instances"])
    assert (state["model"], state["waiting"], state["in_flight"]) == ("tiny", 0, 0)
    assert state["summary"]["requests"] == 2
    assert state["summary"]["ttft_ms"]["p50"] > 0
    kinds = {(move["kind"], move["layer"]) for move in state["moves"]}
    assert {("pack", 0), ("pack", 1), ("unpack", 0), ("unpack", 1)} <= kinds
    assert all(move["start_ms"] <= move["stop_ms"] for move in state["moves"])


def test_page_loads_nothing_from_elsewhere(traced: Serving) -> None:
    answer = httpx.get(traced.url + "/ui")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"(src|href)=|https?://", answer.text)


@pytest.mark.skipif(not any(map(shutil.which, SHELLS)), reason="no headless Chromium here")
def test_page_in_a_browser(traced: Serving, tmp_path: Path) -> None:
    """Instances, percentiles and the timeline appear by themselves; the prompt box streams an answer."""
    state_of(traced)
    with Browser(next(filter(None, map(shutil.which, SHELLS))), tmp_path / "profile") as browser:
        browser.open(traced.url + "/ui")
        browser.until("document.querySelectorAll('#instances tbody tr').length == 2")
        assert "prefill" in browser.run("document.querySelector('#instances').innerText")
        browser.until("document.querySelector('#legend').innerText.includes('bytes')")
        drawn = "document.querySelector('#timeline').getContext('2d').getImageData(0, 0, 2000, 200).data.some((v) => v)"
        assert browser.run(drawn) is True
        browser.run("document.querySelector('#tokens').value = 12; document.querySelector('#send').click()")
        browser.until("document.querySelector('#speed').innerText.includes('first token')")
        assert len(browser.run("document.querySelector('#answer').innerText")) > 5
        assert browser.errors == []
        picture = browser.screenshot()
        if os.environ.get("HETKV_SCREENSHOT"):
            Path(os.environ["HETKV_SCREENSHOT"]).write_bytes(picture)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_spans(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    """Each request is one trace: its phases in the scheduler, and every layer of its transfer in both instances."""
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    file = tmp_path / "trace.json"
    options = ["--model", str(checkpoint[0]), "--served-name", "tiny", "--port", "0", *QUICK, "--trace", str(file)]
    with serving(tmp_path / "log", options) as server:
        for number in range(3):
            body = {**PROMPT, "prompt": [number + 5] * 40}
            assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
        time.sleep(1.5)  # instances report every half second
    events = json.loads(file.read_text())
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "b"]
    ends = {(event["pid"], event["id"], event["name"]): event["ts"] for event in events if event["ph"] == "e"}
    assert all(ends[span["pid"], span["id"], span["name"]] >= span["ts"] for span in spans)
    traces = {span["args"]["trace_id"] for span in spans if span["name"] == "request"}
    assert len(traces) == 3
    for trace in traces:
        mine = [span for span in spans if span["args"]["trace_id"] == trace]
        [root] = [span for span in mine if span["name"] == "request"]
        assert root["args"]["output_tokens"] == 8
        assert all(span["args"]["parent_id"] == root["args"]["span_id"] for span in mine if span is not root)
        phases = [span["name"] for span in mine if names[span["pid"]] == "scheduler"]
        assert sorted(phases) == ["decode", "prefill", "queue", "request"]
        moves = {(names[span["pid"]].split("-")[0], span["name"]) for span in mine if names[span["pid"]] != "scheduler"}
        assert {("prefill", "pack layer 0"), ("prefill", "pack layer 1")} <= moves
        assert {("decode", "unpack layer 0"), ("decode", "unpack layer 1")} <= moves


def test_layers_of_requests_that_an_instance_has_forgotten(tmp_path: Path) -> None:
    """They have no name: left out, and nothing else is lost for them."""
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
    from hetkv.serve import tracing

    member: Any = SimpleNamespace(name="prefill-0")
    trace = Trace([Moved("pack", "", 0, 1, 2, 8), Moved("pack", f"{7:032x}/1", 1, 3, 4, 8)], 0)
    tracer = tracing.RequestTracer(tracing.PerfettoExporter(tmp_path / "trace.json"))
    tracer.on_trace(member, trace)
    tracer.close()
    spans = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text()) if event["ph"] == "b"]
    assert spans == ["pack layer 1"]
    moves = Moves()
    moves.on_trace(member, trace)
    assert moves.latest() == []
