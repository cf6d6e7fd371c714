"""`hetkv bench NAME`: one module of `hetkv.bench` per name, which imports what it measures only when it runs."""

from __future__ import annotations

import argparse
from importlib import import_module

BENCHES = {
    "codec": "what codecs of payloads save and cost, and a link of a given rate with each and without",
    "remap": "layout and dtype conversion against memcpy of as many bytes",
    "network": "pool to pool over TCP between two network namespaces, against a plain socket loop there",
    "overlap": "what sending costs a prefill on a GPU, and how much of the transfer is exposed after it",
    "traffic": "many requests at once and small ones, pool to pool, against the link and NIXL",
    "transfer": "pool to pool between two processes, against UCX and other transports",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-subcommand per measurement."""
    benches = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, summary in BENCHES.items():
        bench = benches.add_parser(name, help=summary, description=summary)
        import_module(f"hetkv.bench.{name}").add_arguments(bench)


def run(args: argparse.Namespace) -> int:
    """Run the measurement that `args.bench` names."""
    return int(import_module(f"hetkv.bench.{args.bench}").run(args))
