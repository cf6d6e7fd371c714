"""`hetkv bench network`: pool to pool over TCP between two network namespaces, against a plain socket loop there.

Each round runs the plain loop and hetkv, over as many connections, one after the other; ratios are of one round. The
plain loop sends and receives one buffer of 1 MiB again and again, a thread a connection, and neither packs, converts
nor checks anything. See docs/measuring.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from hetkv.bench import namespaces
from hetkv.bench.child import Child
from hetkv.bench.namespaces import Place, Places
from hetkv.bench.pair import Pair, Shape
from hetkv.errors import BenchmarkError, InputError
from hetkv.transport.config import TransferConfig

MIB = 1 << 20
TARGET = 0.85
LAYER_TOKENS = 4096
"""Of a layer of 16 MiB."""
MOST_MIB = {0: 1 << 20, 10_000: 512, 1000: 64}
"""Bytes of a request at most, by the rate in Mbit/s: half a second each."""


class PlainEnd:
    """One end of the plain loop, in a process of its own."""

    def __init__(self, place: Place, total: int, connections: int) -> None:
        place.enter()
        self.address, self.each, self.count = place.address, total // connections, connections
        self.sockets: list[socket.socket] = []
        self.listener: socket.socket | None = None

    def listen(self) -> int:
        self.listener = socket.create_server((self.address, 0))
        return int(self.listener.getsockname()[1])

    def connect(self, address: str, port: int) -> None:
        self.sockets = [socket.create_connection((address, port)) for _ in range(self.count)]

    def accept(self) -> None:
        assert self.listener is not None
        self.sockets = [self.listener.accept()[0] for _ in range(self.count)]

    def run(self, sends: bool) -> float:
        """Move everything once; seconds since the first byte could leave."""
        began = time.monotonic()
        threads = [threading.Thread(target=self._send if sends else self._receive, args=(s,)) for s in self.sockets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - began

    def _send(self, sock: socket.socket) -> None:
        buffer = memoryview(bytes(MIB))
        for at in range(0, self.each, MIB):
            sock.sendall(buffer[: min(MIB, self.each - at)])
        if not sock.recv(1):  # all has arrived
            raise BenchmarkError("the plain loop's receiver has ended")

    def _receive(self, sock: socket.socket) -> None:
        buffer, left = memoryview(bytearray(MIB)), self.each
        while left:
            got = sock.recv_into(buffer[: min(MIB, left)])
            if not got:
                raise BenchmarkError("the plain loop's sender has ended")
            left -= got
        sock.sendall(b"!")

    def cpu(self) -> float:
        return time.process_time()

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


class Plain:
    """The plain loop between two places, over some connections. Close it."""

    def __init__(self, places: Places, total: int, connections: int) -> None:
        self.total = total
        self.ends = [Child(f"plain loop {n}", PlainEnd, (places[n], total, connections)) for n in (0, 1)]
        for end in self.ends:
            end.answer()
        port = self.ends[1].ask("listen")
        self.ends[0].ask("connect", places[1].address, port)
        self.ends[1].ask("accept")

    def seconds(self) -> float:
        self.ends[1].pipe.send(("run", False))
        took = float(self.ends[0].ask("run", True))
        self.ends[1].answer()
        return took

    def cpu(self) -> float:
        return float(sum(end.ask("cpu") for end in self.ends))

    def close(self) -> None:
        for end in self.ends:
            end.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench network`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="layers of 16 MiB a request (default 16)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds (default 7)")
    parser.add_argument(
        "--connections", type=int, action="append", metavar="N", help="of a link; repeatable (default 1 and 4)"
    )
    parser.add_argument(
        "--encrypt", action="store_true", help="measure encrypted streams, too, in the same rounds as those in clear"
    )
    parser.add_argument(
        "--mbit", type=float, action="append", metavar="N", help="rates to limit the way to, by tbf (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON."""
    from hetkv import terminal
    from hetkv.bench.environment import environment

    if args.layers < 1 or args.rounds < 1:
        raise InputError("--layers and --rounds: at least 1")
    if why := namespaces.why_not(bool(args.mbit)):
        raise BenchmarkError(why)
    console, load, rows = terminal.console(args.json), os.getloadavg()[0], []
    for rate in [0, *(args.mbit or [])]:
        for connections in args.connections or [1, 4]:
            rows.append(measure(args.layers, connections, args.rounds, rate, args.encrypt))
    show(console, rows)
    if args.json:
        note = (
            "GB/s: 10^9 payload bytes a second; medians over rounds; ratio: hetkv / plain loop, of_clear: encrypted / "
            "in clear, each of one round"
        )
        report = {**environment(), "rounds": args.rounds, "load_average": round(load, 2), "target": TARGET}
        terminal.write_json(args.json, {**report, "note": note, "results": rows})
    return 0


def measure(layers: int, connections: int, rounds: int, mbit: float = 0, encrypt: bool = False) -> dict[str, Any]:
    """One row: the plain loop and hetkv between the same two namespaces, in turns; and hetkv with encrypted streams."""
    most = min((mib for rate, mib in MOST_MIB.items() if rate >= mbit), default=1 << 20) if mbit else 1 << 20
    shape = Shape(min(layers, max(1, most // 16)), LAYER_TOKENS)
    config = TransferConfig(streams=connections)
    plain_s: list[float] = []
    hetkv_s: list[float] = []
    secret_s: list[float] = []
    with namespaces.joined(mbit) as (source, destination), contextlib.ExitStack() as stack:
        places = source._replace(private_shm=True), destination._replace(private_shm=True)
        plain = stack.enter_context(contextlib.closing(Plain(places, shape.payload_bytes, connections)))
        pair = stack.enter_context(Pair(shape, config, places=places))
        secret = None
        if encrypt:
            secret = stack.enter_context(Pair(shape, msgspec.structs.replace(config, encrypt=True), places=places))
            secret.send()
        pair.send()
        plain.seconds()
        before = plain.cpu(), sum(pair.cpu()), sum(secret.cpu()) if secret else 0.0
        for _ in range(rounds):
            plain_s.append(plain.seconds())
            hetkv_s.append(pair.send().seconds)
            if secret:
                secret_s.append(secret.send().seconds)
        after = plain.cpu(), sum(pair.cpu()), sum(secret.cpu()) if secret else 0.0
        path, verified = pair.path(), pair.verify()
        cipher = secret.cipher() if secret else ""
        if secret and (not cipher or pair.cipher() or secret.verify() != verified):
            raise BenchmarkError(f"streams are not what they should be: cipher {cipher!r} and {pair.cipher()!r}")
    size = shape.payload_bytes / 1e9
    cpu = [round((b - a) / rounds / size, 3) for a, b in zip(before, after, strict=True)]
    row = {
        "mbit": mbit,
        "connections": connections,
        "mib": shape.payload_bytes >> 20,
        "path": path,
        "plain_gb_s": round(size / statistics.median(plain_s), 3),
        "hetkv_gb_s": round(size / statistics.median(hetkv_s), 3),
        "ratio": round(statistics.median(a / b for a, b in zip(plain_s, hetkv_s, strict=True)), 3),
        "ratio_rounds": [round(a / b, 3) for a, b in zip(plain_s, hetkv_s, strict=True)],
        "plain_cpu_s_per_gb": cpu[0],
        "hetkv_cpu_s_per_gb": cpu[1],
        "verified_bytes": verified,
    }
    if encrypt:
        rates = [round(a / b, 3) for a, b in zip(hetkv_s, secret_s, strict=True)]
        row["encrypted"] = {
            "cipher": cipher,
            "gb_s": round(size / statistics.median(secret_s), 3),
            "of_clear": round(statistics.median(rates), 3),
            "of_clear_rounds": rates,
            "cpu_s_per_gb": cpu[2],
        }
    return row


def show(console: Any, rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    from rich.table import Table

    table = Table(
        "limit", "connections", "plain GB/s", "hetkv GB/s", "ratio", "rounds", "CPU s/GB, plain", "hetkv", box=None
    )
    for row in rows:
        table.add_row(
            f"{row['mbit']:g} Mbit/s" if row["mbit"] else "none",
            str(row["connections"]),
            f"{row['plain_gb_s']:.3f}",
            f"{row['hetkv_gb_s']:.3f}",
            f"{row['ratio']:.2f}",
            f"{min(row['ratio_rounds']):.2f}-{max(row['ratio_rounds']):.2f}",
            f"{row['plain_cpu_s_per_gb']:.2f}",
            f"{row['hetkv_cpu_s_per_gb']:.2f}",
        )
    console.print(table)
    if any("encrypted" in row for row in rows):
        show_encrypted(console, rows)


def show_encrypted(console: Any, rows: list[dict[str, Any]]) -> None:
    """What encryption costs: the same transfers, in the same rounds."""
    from rich.table import Table

    table = Table(
        "limit", "connections", "cipher", "GB/s", "of clear", "rounds", "CPU s/GB, clear", "encrypted", box=None
    )
    for row in rows:
        found = row["encrypted"]
        table.add_row(
            f"{row['mbit']:g} Mbit/s" if row["mbit"] else "none",
            str(row["connections"]),
            found["cipher"],
            f"{found['gb_s']:.3f}",
            f"{found['of_clear']:.2f}",
            f"{min(found['of_clear_rounds']):.2f}-{max(found['of_clear_rounds']):.2f}",
            f"{row['hetkv_cpu_s_per_gb']:.2f}",
            f"{found['cpu_s_per_gb']:.2f}",
        )
    console.print(table)
