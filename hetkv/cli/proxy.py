"""`hetkv proxy`: a small router before vLLM servers that prefill and vLLM servers that decode (docs/vllm.md)."""

from __future__ import annotations

import argparse

from hetkv.errors import InputError

MODES = ("prefill_first", "concurrent")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv proxy`."""
    parser.add_argument("--prefill", nargs="+", required=True, metavar="URL", help="prefill servers")
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL", help="decode servers")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="decode after the prefill's answer (vLLM's convention), or both at once, so that layers travel while "
        "later ones compute",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest silence of a server")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends the process."""
    from hetkv.integrations.vllm.proxy import Router, serve

    for url in (*args.prefill, *args.decode):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is not a URL: write http://host:port")
    prefill, decode = ([url.rstrip("/") for url in urls] for urls in (args.prefill, args.decode))
    serve(Router(prefill, decode, args.mode, args.timeout), args.host, args.port)
    return 0
