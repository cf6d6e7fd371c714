"""The page at `/ui`: instances, queues, percentiles, the latest transfer layer by layer, and a prompt box."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from hetkv.serve.member import Member
from hetkv.serve.messages import Trace
from hetkv.serve.metrics import Metrics
from hetkv.serve.scheduler import Scheduler

HTML = Path(__file__).parent / "data" / "ui.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
KEPT = 16
"""Transfers whose layers are kept."""
MOST_MOVES = 2000
"""Of one transfer."""


class Moves:
    """The layers of the latest transfers, as the instances report them."""

    def __init__(self) -> None:
        self._transfers: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    def on_trace(self, _: Member, trace: Trace) -> None:
        """Take what an instance's transport did."""
        for moved in trace.moved:
            if not moved.transfer:
                continue  # the instance has forgotten which request it was of
            moves = self._transfers.setdefault(moved.transfer, [])
            if len(moves) < MOST_MOVES:
                start, stop = ((ns + trace.clock_ns) / 1e6 for ns in (moved.start_ns, moved.stop_ns))
                moves.append({"kind": moved.kind, "layer": moved.layer, "start_ms": start, "stop_ms": stop,
                              "bytes": moved.num_bytes})  # fmt: skip
        while len(self._transfers) > KEPT:
            self._transfers.popitem(last=False)

    def latest(self) -> list[dict[str, Any]]:
        """Of the newest transfer whose receiver has reported, too."""
        for moves in reversed(self._transfers.values()):
            if any(move["kind"] == "unpack" for move in moves):
                return moves
        return []


def add_page(
    app: FastAPI, model: str, scheduler: Scheduler, metrics: Metrics, moves: Moves, timeline: bool = False
) -> None:
    """Routes `/ui` and `/ui/state`. `timeline`: instances report what their transports do."""

    @app.get("/ui")
    async def page() -> HTMLResponse:
        return HTMLResponse(HTML.read_text(), headers={"Content-Security-Policy": POLICY})

    @app.get("/ui/state")
    async def state() -> JSONResponse:
        members = [
            {
                "name": member.name,
                "role": member.role,
                "up": member.up,
                "device": member.hello.device,
                "kv": member.hello.kv,
                "requests": member.requests,
                "prompt_tokens": member.prompt_tokens,
                "kv_blocks": member.kv.total,
                "kv_blocks_free": member.kv.available,
                "preemptions": member.load.preemptions,
            }
            for member in sorted(scheduler.members.values(), key=lambda member: (member.role != "prefill", member.name))
        ]
        found = {
            "model": model,
            "instances": members,
            "waiting": len(scheduler.waiting),
            "in_flight": len(scheduler.generations),
            "summary": metrics.summary(),
            "timeline": timeline,
            "moves": moves.latest(),
        }
        return JSONResponse(found)
