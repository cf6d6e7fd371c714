"""`hetkv doctor`: whether each lane proves itself on this host, what limits it, and what to change."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv doctor`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts to FILE")


def run(args: argparse.Namespace) -> int:
    """Try, print, write the JSON. 1 where a lane that this host should have does not work."""
    from rich.console import Console

    from hetkv import terminal
    from hetkv.bench import doctor

    console = terminal.console(args.json)
    with Console(file=sys.stderr).status("two processes move a few bytes over each lane"):
        found = doctor.examine()
    show(console, found)
    if args.json:
        terminal.write_json(args.json, found)
    return 1 if doctor.failed(found) else 0


def show(console: Console, found: dict[str, Any]) -> None:
    """The table, and the advice."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("what", "found", box=None, show_header=False)
    for name, lane in found["lanes"].items():
        text = f"works: {lane['us']} us, {lane['verified_bytes']} bytes verified" if lane["works"] else lane["why_not"]
        table.add_row(f"lane {name}", escape(text))
    ucx, bounds, shm = found["ucx"], found["limits"], found["limits"]["dev_shm"]
    verbs = "with verbs" if ucx.get("has_verbs") else "without verbs"
    table.add_row("UCX, for RDMA", "none" if "error" in ucx else f"{ucx['version']} of {ucx['origin']}, {verbs}")
    table.add_row("RDMA devices", ", ".join(bounds["rdma_devices"]) or "none")
    table.add_row(
        "/dev/shm", "absent" if shm is None else f"{shm['free_bytes'] >> 20} of {shm['bytes'] >> 20} MiB free"
    )
    locked = bounds["memlock_bytes"]
    table.add_row("lockable memory", "no limit" if locked is None else f"{locked >> 10} KiB")
    table.add_row("open files", str(bounds["open_files"]))
    spaces = dict(found["namespaces"])
    kind = "a container" if spaces.pop("container") else "no container that says so"
    table.add_row("namespaces", escape(f"{kind}; {', '.join(spaces.values())}"))
    table.add_row("IPv6", "yes" if found["ipv6"] else "no")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    console.print(table)
    for line in found["advice"]:
        console.print(f"[bold yellow]change:[/] {escape(line)}", highlight=False)
    if not found["advice"]:
        console.print("nothing to change")
