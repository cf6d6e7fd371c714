"""`hetkv probe`: the path, lanes and rates that hetkv gets on this host, or to another one."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetkv.cli import tls_options
from hetkv.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

SECRET = "HETKV_SECRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv probe`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts to FILE")
    parser.add_argument(
        "--mib", type=float, default=64, metavar="MIB", help="payload of the requests that are tried (default 64)"
    )
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument(
        "--listen", metavar="HOST:PORT", help=f"wait for a --connect from another host; the secret is in {SECRET}"
    )
    ends.add_argument(
        "--connect", metavar="HOST:PORT", help="try the host that runs --listen, with the secret that it printed"
    )
    tls_options.add_arguments(parser, "of --listen and --connect")
    parser.add_argument(
        "--timeout", type=float, default=60, metavar="S", help="patience of --listen and --connect (default 60)"
    )


def run(args: argparse.Namespace) -> int:
    """Probe, print, write the JSON. Warnings do not change the exit status."""
    from rich.console import Console

    from hetkv import terminal
    from hetkv.bench import probe

    if not 0 < args.mib <= 4096:  # also `nan`
        raise InputError(f"--mib {args.mib:g}: more than 0, at most 4096")
    if not args.timeout > 0:
        raise InputError(f"--timeout {args.timeout:g}: more than 0")
    tls = tls_options.tls_config(args)
    if tls is not None and not (args.listen or args.connect):
        raise InputError("TLS is for --listen and --connect")
    console = terminal.console(args.json)
    if args.listen:
        given = os.environ.get(SECRET)
        secret = given or secrets.token_hex(16)

        def report(address: str) -> None:
            shown = f"{SECRET}=..." if given else f"{SECRET}={secret}"
            host, _, port = address.rpartition(":")
            if host in ("0.0.0.0", "[::]"):
                address = f"{socket.gethostname()}:{port}"
            size = "" if args.mib == 64 else f" --mib {args.mib:g}"
            own = "" if tls is None else " --tls-ca ... --tls-certificate ..."
            print(f"waiting; on the other host: {shown} hetkv probe --connect {address}{size}{own}", flush=True)

        found = probe.listen(args.listen, secret.encode(), args.mib, args.timeout, report, tls)
        show_peer(console, found)
    elif args.connect:
        if SECRET not in os.environ:
            raise InputError(f"--connect needs {SECRET}, which --listen prints")
        found = probe.connect(args.connect, os.environ[SECRET].encode(), args.mib, args.timeout, tls)
        show_peer(console, found)
    else:
        with Console(file=sys.stderr).status("two processes move a small request over each path"):
            found = probe.probe(args.mib)
        show_host(console, found)
    for warning in found.get("warnings", []):
        console.print(f"[bold yellow]warning:[/] {warning}", highlight=False)
    if args.json:
        terminal.write_json(args.json, found)
    return 0


def show_host(console: Console, found: dict[str, Any]) -> None:
    """The table of one host."""
    from rich.table import Table

    table = Table("what", "found", box=None, show_header=False)
    table.add_row("CPU", f"{found['cpus']} x {found['device']}; remap uses {found['cpu']['isa']}")
    for name, gpu in found["gpu"].items():
        if not gpu["present"]:
            table.add_row(name.upper(), f"absent ({gpu['why_not']})")
        for index, device in enumerate(gpu["devices"]):
            can = ", ".join(device["capabilities"])
            size = device["total_memory"] >> 30
            table.add_row(f"{name.upper()} {index}", f"{device['name']}, {device['arch']}, {size} GiB; {can}")
    facts = found["ucx"]
    verbs = "with verbs" if facts.get("has_verbs") else "without verbs"
    table.add_row("UCX, for RDMA", "none" if "error" in facts else f"{facts['version']} of {facts['origin']}, {verbs}")
    for way, result in {**found["local"], **found.get("devices", {})}.items():
        text = (
            result.get("error")
            or f"{result['gb_s']:.2f} GB/s, path {result['path']}, {result['verified_bytes']} bytes verified"
        )
        table.add_row(f"two processes, {way}", text)
    bounds = found["limits"]
    locked, shared = bounds["memlock_bytes"], bounds["dev_shm"]
    table.add_row("lockable memory", "no limit" if locked is None else f"{locked >> 10} KiB")
    table.add_row(
        "/dev/shm", "absent" if shared is None else f"{shared['free_bytes'] >> 20} MiB free of {shared['bytes'] >> 20}"
    )
    table.add_row("RDMA devices", ", ".join(bounds["rdma_devices"]) or "none")
    console.print(table)


def show_peer(console: Console, found: dict[str, Any]) -> None:
    """One line about the other end."""
    where = "this host" if found["same_host"] else "another host"
    path = f", path {found['path']}" if "path" in found else ""
    streams = f" over {found['streams']}" if "streams" in found else ""
    console.print(f"{found['peer']} ({where}){streams}: {found['gb_s']:.2f} GB/s{path}", highlight=False)
