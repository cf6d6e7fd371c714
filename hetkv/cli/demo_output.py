"""The tables of `hetkv demo`."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hetkv.kv.spec import Interval
from hetkv.models import ModelConfig
from hetkv.runtime.demo import DemoOptions, DemoResult
from hetkv.runtime.timing import TimingResult


def show_pair(console: Console, options: DemoOptions, result: DemoResult) -> None:
    """Both texts of one request, and whether they are the same."""
    console.print(f"[bold]prompt[/]          {escape(options.prompt)}")
    console.print(f"[bold]two processes[/]   {escape(result.text.strip())}")
    console.print(f"[bold]one process[/]     {escape(result.single_process_text.strip())}")
    console.print(f"[bold]{result.generated_tokens} tokens[/]       {_verdict(result.identical)}\n")


def show_deployment(console: Console, result: DemoResult, config: ModelConfig) -> None:
    """Instances, requests and routes of a whole deployment."""
    instances = _table("instance", "", "rank", "layers", "KV heads", "pool")
    for instance in result.instances:
        for rank, shard in enumerate(instance.shards(config)):
            first = (instance.name, str(instance)) if rank == 0 else ("", "")
            instances.add_row(
                *first, str(rank), _span(shard.layers), _span(shard.heads[shard.layers.start]),
                str(instance.pool) if rank == 0 else "",
            )  # fmt: skip
    console.print(instances, "")
    requests = _table("request", "prefill", "decode", "prompt", "new", "as one process")
    for index, request in enumerate(result.requests):
        requests.add_row(
            str(index),
            request.prefill,
            request.decode,
            str(request.prompt_tokens),
            str(request.generated_tokens),
            _verdict(request.identical),
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
    """Pools and times."""
    table = figures()
    if len(result.instances) == 2:
        table.add_row("prefill pool", str(result.prefill))
        table.add_row("decode pool", str(result.decode))
    add_times(table, result, "" if len(result.requests) == 1 else f" (means of {len(result.requests)} requests)")
    console.print(table)


def figures() -> Table:
    """A table of names and what was found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    return table


def add_times(table: Table, result: DemoResult | TimingResult, of: str = "") -> None:
    """Rows of what was moved, and how long it took."""
    table.add_row(
        "moved",
        f"{result.payload_bytes / 1024:.0f} KiB of {result.layers} layers in {result.frames} frames, "
        f"{result.direct_frames} straight into the window",
    )
    table.add_row("TTFT", f"{result.ttft_ms:.1f} ms, of which prefill {result.prefill_ms:.1f} ms{of}")
    table.add_row(
        "transfer",
        f"{result.transfer_ms:.1f} ms, of which exposed behind the prefill {result.exposed_transfer_ms:.2f} ms",
    )
    table.add_row("TPOT", f"{result.tpot_ms:.2f} ms")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _span(interval: Interval) -> str:
    """The last one included, as people count."""
    return str(interval.start) if interval.size == 1 else f"{interval.start}-{interval.stop - 1}"


def _verdict(identical: bool) -> str:
    return "[green]identical[/]" if identical else "[red]different[/]"
