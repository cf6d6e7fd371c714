"""`hetkv loadtest`: a traffic against a running server, measured as `hetkv simulate` counts."""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

from hetkv import terminal
from hetkv.cli.traffic import add_traffic, ended, print_latencies, print_slo, rates, traffic_of, write_rows
from hetkv.errors import InputError

API_KEY_ENV = "OPENAI_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv loadtest`."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of any OpenAI-compatible server, without /v1")
    parser.add_argument("--model", metavar="NAME", help="default: the one that the server has")
    parser.add_argument("--api-key", default=os.environ.get(API_KEY_ENV, ""), metavar="KEY", help=f"or ${API_KEY_ENV}")
    add_traffic(parser)
    parser.add_argument(
        "--concurrency", type=int, metavar="N", help="most requests at a time; others wait, which counts"
    )
    parser.add_argument(
        "--vocabulary", type=int, default=1000, metavar="N", help="prompts are token ids below this (default 1000)"
    )
    parser.add_argument("--text", action="store_true", help="prompts are words, for servers that take no token ids")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest silence of the server")
    parser.add_argument("--json", metavar="FILE", help="write the summary")
    parser.add_argument("--csv", metavar="FILE", help="write one row per request")


def run(args: argparse.Namespace) -> int:
    """Send all requests, print the figures; 1 where none finished."""
    from hetkv.serve.loadtest import LoadTest, Target, only_model
    from hetkv.simulator.metrics import summarise

    terminal.check_outputs({"csv": args.csv})
    if args.concurrency is not None and args.concurrency < 1:
        raise InputError(f"--concurrency must be at least 1, not {args.concurrency}")
    url = args.url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"--url {args.url}: write http://host:port")
    if args.clients is not None:
        raise InputError("--clients: a load test has no closed loop; --concurrency limits the requests in flight")
    traffic, slo = traffic_of(args)
    workload = traffic.build()
    model = args.model or asyncio.run(only_model(url, args.api_key))
    target = Target(
        url=url,
        model=model,
        api_key=args.api_key,
        vocabulary=0 if args.text else args.vocabulary,
        timeout_s=args.timeout,
        concurrency=args.concurrency,
    )
    test = LoadTest(target)
    seconds = _with_progress(test, workload, args)
    columns = test.records.columns()
    summary = summarise(columns, slo, seconds)
    summary.update(workload=workload.about, seed=args.seed, url=url, model=model, errors=test.errors)
    if args.json:
        terminal.write_json(args.json, summary)
    if args.csv:
        write_rows(args.csv, columns)
    console = terminal.console(args.json)
    print_latencies(console, summary)
    console.print(f"{ended(summary)} in {seconds:,.1f} s: {rates(summary)}")
    print_slo(console, summary, slo)
    for text, count in sorted(test.errors.items(), key=lambda item: -item[1]):
        console.print(f"[yellow]{count} x[/] {text}", highlight=False, soft_wrap=True)
    return 0 if summary["finished"] else 1


def _with_progress(test: Any, workload: Any, args: argparse.Namespace) -> float:
    """Run, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[sent]} sent, ended:"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=args.requests, sent=0)

        def tell(sent: int, done: int) -> None:
            progress.update(task, completed=done, sent=sent)

        seconds: float = asyncio.run(test.run(workload, args.seed, tell))
    return seconds
