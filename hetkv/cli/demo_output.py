"""What `hetkv demo` prints. Prompts and texts are shown as they are: nothing in them is markup."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hetkv.kv.spec import Interval
from hetkv.models import ModelConfig
from hetkv.runtime.demo import DemoResult, Outcome, RequestResult
from hetkv.runtime.timing import TimingResult

COLOURS: dict[Outcome, str] = {"identical": "green", "rounding": "yellow", "different": "red", "not compared": "dim"}
REFERENCES = {"transformers": "transformers", "self": "one process", "none": "nothing"}


def show_pair(console: Console, result: DemoResult) -> None:
    """One request of one pair: its texts, and how they compare."""
    request = result.requests[0]
    _show_text(console, "prompt", request.prompt)
    _show_text(console, "two processes", request.text.strip())
    if request.reference_text is not None:
        _show_text(console, REFERENCES[result.reference], request.reference_text.strip())
    console.print(
        Text.assemble((f"{result.generated_tokens} tokens".ljust(15), "bold"), " ", _verdict(result, request)), ""
    )


def _show_text(console: Console, name: str, text: str) -> None:
    console.print(Text.assemble((name.ljust(15), "bold"), " ", _printable(text)))


def _printable(text: str) -> str:
    """Control characters but line ends would act on the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _verdict(result: DemoResult, request: RequestResult) -> Text:
    text = Text(request.outcome, style=COLOURS[request.outcome])
    if request.outcome != "not compared":
        text.append(f" (compared with {REFERENCES[result.reference]})", style="dim")
    if request.outcome == "rounding":
        text.append(f": from token {request.first_difference} on, as one process that rounds KV to the pools' dtypes")
    return text


def show_deployment(console: Console, result: DemoResult, config: ModelConfig) -> None:
    """Instances and what they hold, requests and how they compare, and what every rank sent to every other."""
    instances = _table("instance", "", "rank", "layers", "KV heads", "pool")
    for instance in result.instances:
        for rank, shard in enumerate(instance.shards(config)):
            first = (instance.name, str(instance)) if rank == 0 else ("", "")
            instances.add_row(
                *first, str(rank), _span(shard.layers), _span(shard.heads[shard.layers.start]),
                str(instance.pool) if rank == 0 else "",
            )  # fmt: skip
    console.print(instances, "")
    requests = _table("request", "prefill", "decode", "prompt", "new", f"as {REFERENCES[result.reference]}")
    for index, request in enumerate(result.requests):
        requests.add_row(
            str(index),
            request.prefill,
            request.decode,
            str(request.prompt_tokens),
            str(request.generated_tokens),
            Text(request.outcome, style=COLOURS[request.outcome]),
        )
    console.print(requests, "")
    routes = _table("from rank", "to rank", "layers", "KV heads", "bytes")
    routes.columns[-1].justify = "right"
    for route in result.routes:
        routes.add_row(route.source, route.destination, _span(route.layers), _span(route.heads), f"{route.bytes:,}")
    routes.add_section()
    routes.add_row("all", "", "", "", f"{sum(route.bytes for route in result.routes):,}")
    routes.add_row("counted", "", "", "", f"{result.payload_bytes:,}")
    console.print(routes, "")


def show_figures(console: Console, result: DemoResult) -> None:
    """Pools, bytes and times."""
    table = figures()
    if len(result.instances) == 2:
        table.add_row("prefill pool", str(result.prefill))
        table.add_row("decode pool", str(result.decode))
    add_times(table, result, "" if len(result.requests) == 1 else f" (means of {len(result.requests)} requests)")
    console.print(table)


def figures() -> Table:
    """A table of names and values."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    return table


def add_times(table: Table, result: DemoResult | TimingResult, of: str = "") -> None:
    """Bytes and times, which are `of` something."""
    table.add_row(
        "moved",
        f"{result.payload_bytes / 1024:.0f} KiB of {result.layers} layers in {result.frames} frames, "
        f"{result.direct_frames} straight into the window",
    )
    table.add_row("TTFT", f"{result.ttft_ms:.1f} ms, of which prefill {result.prefill_ms:.1f} ms{of}")
    table.add_row(
        "transfer",
        f"{result.transfer_ms:.1f} ms, of which exposed after the prefill {result.exposed_transfer_ms:.2f} ms",
    )
    table.add_row("TPOT", f"{result.tpot_ms:.2f} ms")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _span(interval: Interval) -> str:
    """The last one included, as people count."""
    return str(interval.start) if interval.size == 1 else f"{interval.start}-{interval.stop - 1}"
