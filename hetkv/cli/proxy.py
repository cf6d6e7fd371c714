"""`hetkv proxy`: the server of `hetkv serve` before vLLM servers that prefill and vLLM servers that decode."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
from contextlib import suppress

from hetkv.errors import InputError

MODES = ("prefill_first", "concurrent")
API_KEYS_ENV = "HETKV_API_KEYS"


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
    parser.add_argument("--prefill-routing", default="least_loaded", metavar="NAME", help="default least_loaded")
    parser.add_argument(
        "--decode-routing", default="join_shortest_queue", metavar="NAME", help="default join_shortest_queue"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest silence of a server")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"one that clients may send (or ${API_KEYS_ENV})",
    )
    parser.add_argument("--max-body", type=int, default=64 << 20, metavar="BYTES", help="default 64 MiB")
    parser.add_argument("--max-requests", type=int, default=4096, metavar="N", help="at a time (default 4096)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; all accepted requests are answered."""
    for url in (*args.prefill, *args.decode):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is not a URL: write http://host:port")
    from hetkv.serve.app import application
    from hetkv.serve.http import HttpOptions, HttpServer, bound
    from hetkv.serve.vllm import VllmEngines
    from hetkv.simulator.router import DISCIPLINES

    routing = args.prefill_routing, args.decode_routing
    for name in routing:
        if name not in DISCIPLINES:
            raise InputError(f"routing {name}: known are {', '.join(DISCIPLINES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    prefill, decode = ([url.rstrip("/") for url in urls] for urls in (args.prefill, args.decode))
    keys = [key.strip() for key in os.environ.get(API_KEYS_ENV, "").split(",") if key.strip()]
    options = HttpOptions(api_keys=(*args.api_key, *keys), max_body=args.max_body, max_requests=args.max_requests)
    listening = bound(args.host, args.port)

    async def serve() -> None:
        engines = VllmEngines(prefill, decode, args.mode, args.timeout, *routing)
        introducing = asyncio.create_task(engines.introduce())
        try:
            await HttpServer(application(engines), options).serve([listening])
        finally:
            introducing.cancel()
            with suppress(asyncio.CancelledError):
                await introducing
            await engines.close()

    asyncio.run(serve())
    return 0
