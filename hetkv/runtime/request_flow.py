"""One request's way through a prefill and a decode instance, and its times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hetkv.runtime.processes import Instance
from hetkv.runtime.timeline import Span
from hetkv.runtime.worker import DecodeResult, PrefillResult

Rendezvous = Literal["concurrent", "prefill_first"]


class Request(NamedTuple):
    """One request and the instances it is routed to."""

    name: str
    prompt: list[int]
    prefiller: Instance
    decoder: Instance


class Run(NamedTuple):
    """What the ranks of a request's instances answered."""

    prefilled: list[PrefillResult]
    decoded: list[DecodeResult]
    spans: list[Span]


def route(request: Request, tokens: int, rendezvous: Rendezvous) -> Run:
    """Take one request through its instances, in the order of the rendezvous mode."""
    name, prompt, prefiller, decoder = request
    accept = ("accept", name, prefiller.plan.name, len(prompt), tokens)
    if rendezvous == "concurrent":
        decoder.call(*accept)
        prefilled = prefiller.call("prefill", name, prompt)
    else:
        prefilled = prefiller.call("prefill", name, prompt)
        decoder.call(*accept)
    decoded = decoder.call("decode", name, prefilled[0].first_token, tokens)
    spans = [span for rank in (*prefilled, *decoded) for span in rank.spans]
    spans += [span for rank in prefiller.call("finish", name) for span in rank]
    return Run(prefilled, decoded, spans)


def counted(instances: Sequence[Instance]) -> dict[str, int]:
    """Counters of all ranks together."""
    ranks = [stats for instance in instances for stats in instance.call("stats")]
    return {name: sum(stats[name] for stats in ranks) for name in ("frames", "payload_bytes", "direct_frames")}


class Times(NamedTuple):
    """Of one request, in milliseconds on one clock. An instance begins with its first rank and ends with its last."""

    ttft_ms: float
    """From the start of the prefill until there is the first token and all KV is in the decode pools."""
    prefill_ms: float
    transfer_ms: float
    """From the first layer handed over until the last layer is verified in the last decode pool."""
    exposed_transfer_ms: float
    """The part of it after the end of the prefill's compute: what the transfer adds to TTFT. 0: nothing."""
    tpot_ms: float


def times(run: Run) -> Times:
    """The times of a request that has run."""
    start, stop = min(rank.start_ns for rank in run.prefilled), max(rank.stop_ns for rank in run.prefilled)
    first_send, kv = min(rank.first_send_ns for rank in run.prefilled), max(rank.kv_ns for rank in run.decoded)
    first, end = max(rank.first_token_ns for rank in run.decoded), max(rank.stop_ns for rank in run.decoded)
    return Times(
        ttft_ms=(max(stop, kv) - start) / 1e6,
        prefill_ms=(stop - start) / 1e6,
        transfer_ms=(kv - first_send) / 1e6,
        exposed_transfer_ms=max(0, kv - stop) / 1e6,
        tpot_ms=(end - first) / 1e6 / max(len(run.decoded[0].tokens) - 1, 1),
    )
