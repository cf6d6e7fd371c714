"""`hetkv bench transfer`: pool to pool between two processes, in one run with UCX's own put and other transports.

The sender's pool is NHD; the receiver's has another layout and another block size, so every transfer converts. Each
round runs hetkv on every path and layout, then `ucx_perftest`, then the peers, so that all see the same state of the
machine; figures are medians over rounds. GB/s is 10^9 bytes of payload a second, every byte counted once. See
docs/measuring.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from hetkv.bench import peers as others
from hetkv.bench import ucx
from hetkv.bench.pair import HEADS, TOKEN_BYTES, Pair, Sent, Shape
from hetkv.errors import HetkvError, InputError
from hetkv.transport.config import TransferConfig

MIB, KIB = 1 << 20, 1 << 10
TARGETS = {"ratio_ucx": 0.45, "ratio_nixl": 2.5, "ratio_unsharded": 0.75}
"""Least ratios at layers of 16 MiB and blocks of 32 KiB."""
UNSHARDED = (1, 1)
PEER_LAYERS = 4
"""Layers that a peer moves at most in one repetition: several are slow."""


class Case(NamedTuple):
    """One way to move the request."""

    path: str
    """`auto` or `put`."""
    to: tuple[str, int]
    """Layout and block size of the receiver."""
    tp: tuple[int, int] = UNSHARDED
    together: bool = False
    """All ranks of a side in one process."""


class Subject:
    """One case of hetkv: processes that live through all rounds, and what they measured."""

    def __init__(self, shape: Shape, config: TransferConfig, together: bool = False) -> None:
        self.pair = Pair(shape, config, together=together)
        self.rounds: list[list[Sent]] = []
        self.cpu_s: list[float] = []
        """Processor seconds a request of each round, all processes together."""

    def run(self, reps: int) -> None:
        self.pair.send()  # the first after a rest finds cold caches
        before = sum(self.pair.cpu())
        self.rounds.append([self.pair.send() for _ in range(reps)])
        self.cpu_s.append((sum(self.pair.cpu()) - before) / reps)

    def gb_s(self) -> list[float]:
        """Of each round, at its median time."""
        total = self.pair.shape.payload_bytes / 1e9
        return [total / statistics.median(sent.seconds for sent in sents) for sents in self.rounds]

    def cpu_s_per_gb(self) -> float:
        """Of the median round; spinning counts."""
        return statistics.median(self.cpu_s) / (self.pair.shape.payload_bytes / 1e9)

    def send_layer_us(self) -> float:
        """Median time of a `send_layer` call."""
        return 1e6 * statistics.median(call for sents in self.rounds for sent in sents for call in sent.send_layer_s)


def parse_layout(text: str) -> tuple[str, int]:
    """`LAYOUT:BLOCK_SIZE`."""
    from hetkv.kv.layout import KVLayout
    from hetkv.kv.spec import LayerSpec

    name, _, size = text.partition(":")
    if not size.isdigit() or int(size) < 1:
        raise InputError(f"--to {text}: give LAYOUT:BLOCK_SIZE, for example hnd:64")
    KVLayout.preset(name, LayerSpec.kv(1, 8), 1, int(size), "bf16")  # names the presets where it is none of them
    return name, int(size)


def parse_tp(text: str) -> tuple[int, int]:
    """`SENDER:RECEIVER`, the ranks over which each splits its 8 heads."""
    sender, _, receiver = text.partition(":")
    if not (sender.isdigit() and receiver.isdigit() and 1 <= int(sender) <= HEADS and 1 <= int(receiver) <= HEADS):
        raise InputError(f"--tp {text}: give SENDER:RECEIVER, each from 1 to {HEADS}, for example 2:1")
    return int(sender), int(receiver)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv bench transfer`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--layer-mib", type=float, default=16, metavar="MIB", help="K and V of one layer (default 16)")
    parser.add_argument(
        "--block-kib", type=int, default=32, metavar="KIB", help="K, or V, of one block of the sender (default 32)"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of one request (default 16; 80 between devices)"
    )
    parser.add_argument(
        "--device",
        nargs="?",
        const="cuda:0,cuda:1",
        metavar="FROM,TO",
        help="between pools on these devices (default cuda:0,cuda:1), compared with NIXL and UCX's put",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of hetkv, UCX and peers (default 5)")
    parser.add_argument("--reps", type=int, default=5, metavar="N", help="requests of each round (default 5)")
    parser.add_argument(
        "--to",
        action="append",
        metavar="LAYOUT:BLOCK_SIZE",
        help="the receiver's pool; repeatable (default hnd:64 and rocm:64)",
    )
    parser.add_argument(
        "--tp",
        action="append",
        default=[],
        metavar="SENDER:RECEIVER",
        help="also the same bytes between so many ranks, each a process and all of a side in one; repeatable",
    )
    parser.add_argument(
        "--path", choices=("auto", "stream", "both"), default="both", help="auto: straight into the window if it can"
    )
    parser.add_argument(
        "--peers", default="nixl,mooncake,ucxx", metavar="NAMES", help="other transports to measure, or none"
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="interpreter that has this peer installed",
    )
    for name in (
        "slot_bytes",
        "window_bytes",
        "max_slots_per_link",
        "staging_slots",
        "threads",
        "spin_us",
        "max_blocks",
    ):
        default = getattr(TransferConfig(), name)
        help_text = f"hetkv's setting of that name (default {'by the pool' if default is None else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=help_text)


def check(args: argparse.Namespace) -> int:
    """Tokens of one layer; `InputError` where the options cannot be."""
    if args.layers is None:
        args.layers = 80 if args.device else 16
    for name in ("layers", "rounds", "reps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: at least 1")
    block, layer = args.block_kib * KIB, round(args.layer_mib * MIB)
    if block < TOKEN_BYTES or block % TOKEN_BYTES:
        raise InputError(
            f"--block-kib {args.block_kib}: a multiple of {TOKEN_BYTES // KIB} KiB, one token of 8 heads of 128"
        )
    if layer < 2 * block or layer % (2 * block):
        raise InputError(
            f"--layer-mib {args.layer_mib}: K and V in blocks of {args.block_kib} KiB: a multiple of {2 * block} bytes"
        )
    return int(layer // (2 * TOKEN_BYTES))


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, write the JSON."""
    from hetkv import terminal
    from hetkv.bench.environment import environment

    tokens = check(args)
    if args.device:
        from hetkv.bench import transfer_device

        return transfer_device.run(args, tokens, args.block_kib * KIB // TOKEN_BYTES)
    targets = [parse_layout(text) for text in args.to or ["hnd:64", "rocm:64"]]
    sharded = [tp for tp in map(parse_tp, args.tp) if tp != UNSHARDED]
    names, pythons = others.parse_peers(args.peers), others.parse_pythons(args.peer_python)
    settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    configs = {
        path: TransferConfig(direct=path == "auto", **settings)
        for path in (("auto", "stream") if args.path == "both" else (args.path,))
    }
    block_size = args.block_kib * KIB // TOKEN_BYTES
    console, load = terminal.console(args.json), os.getloadavg()[0]
    with contextlib.ExitStack() as stack, console.status("starting") as status:
        subjects: dict[Case, Subject] = {}
        for to in targets:
            for path, config in configs.items():
                cases = [
                    Case(path, to),
                    *(Case(path, to, tp, together) for tp in sharded for together in (False, True)),
                ]
                for case in cases:
                    shape = Shape(args.layers, tokens, ("nhd", block_size), to, case.tp)
                    subjects[case] = Subject(shape, config, case.together)
                    stack.callback(subjects[case].pair.close)
        ucx_rounds, ucx_error, peer_rounds = measure(args, subjects, names, pythons, status.update)
        status.update("checking what arrived")
        verified = {key: subject.pair.verify() for key, subject in subjects.items()}
        idle = {key: subject.pair.idle_cpu(0.5) for key, subject in subjects.items()}
        paths = {key: subject.pair.path() for key, subject in subjects.items()}
    found = {name: peer_result(rounds) for name, rounds in peer_rounds.items()}
    results = []
    for key, subject in subjects.items():
        rounds, unsharded = subject.gb_s(), subjects[Case(key.path, key.to)].gb_s()
        gb_s, ucx_gb_s = statistics.median(rounds), statistics.median(ucx_rounds) if ucx_rounds else None
        row: dict[str, Any] = {
            "block_kib": args.block_kib,
            "layer_mib": args.layer_mib,
            "layers": args.layers,
            "source": f"nhd:{block_size}",
            "destination": ":".join(map(str, key.to)),
            "tp": list(key.tp),
            "processes": "side" if key.together else "rank",
            "path": paths[key],
            "direct": key.path == "auto",
            "hetkv_gb_s": round(gb_s, 3),
            "hetkv_gb_s_rounds": rounded(rounds),
            "ucx_gb_s": None if ucx_gb_s is None else round(ucx_gb_s, 3),
            "ucx_gb_s_rounds": rounded(ucx_rounds),
            "ratio_unsharded": round(gb_s / statistics.median(unsharded), 3),
            "ratio_unsharded_rounds": rounded([a / b for a, b in zip(rounds, unsharded, strict=True)]),
            "ratio_ucx": None if ucx_gb_s is None else round(gb_s / ucx_gb_s, 3),
            "ratio_ucx_rounds": rounded([a / b for a, b in zip(rounds, ucx_rounds, strict=False)]),
            "peers": found,
            **{
                f"ratio_{name}": round(gb_s / peer["gb_s"], 3) if "gb_s" in peer else None
                for name, peer in found.items()
            },
            "cpu_s_per_gb": round(subject.cpu_s_per_gb(), 3),
            "send_layer_us": round(subject.send_layer_us(), 2),
            "idle_cpu_percent": rounded([100 * share for share in idle[key]]),
            "verified_bytes": verified[key],
        }
        if ucx_error:
            row["ucx_error"] = ucx_error
        results.append(row)
    show(console, results, found, args)
    if args.json:
        report = {
            **environment(),
            "ucx": {
                "settings": ucx.SETTINGS,
                "version": attempt(ucx.version),
                "how": "ucx_perftest -t ucp_put_bw -e, one layer",
            },
            "settings": settings,
            "rounds": args.rounds,
            "reps": args.reps,
            "load_average": round(load, 2),
            "targets": TARGETS,
            "note": "GB/s: 10^9 payload bytes a second, each counted once; medians over rounds; ratio = hetkv / other",
            "results": results,
        }
        terminal.write_json(args.json, report)
    return 0


SETTINGS = ("slot_bytes", "window_bytes", "max_slots_per_link", "staging_slots", "threads", "spin_us")


def measure(
    args: argparse.Namespace, subjects: dict[Case, Subject], names: list[str], pythons: dict[str, str], report: Any
) -> tuple[list[float], str | None, dict[str, list[dict[str, Any]]]]:
    """All rounds: GB/s of UCX, why it has none, and what each peer said each time."""
    ucx_rounds: list[float] = []
    ucx_error = None
    peer_rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        if why := others.absent(name, pythons[name]):
            peer_rounds[name].append({"error": why})
    for turn in range(args.rounds):
        for case, subject in subjects.items():
            report(f"round {turn + 1} of {args.rounds}: hetkv, {case.path}, to {case.to[0]}, {ranks(case)}")
            subject.run(args.reps)
        if ucx_error is None:
            report(f"round {turn + 1} of {args.rounds}: ucx_perftest")
            try:
                ucx_rounds.append(ucx.put_gb_s(round(args.layer_mib * MIB), max(4, args.layers * args.reps)))
            except HetkvError as error:
                ucx_error, ucx_rounds = str(error), []
        for name, rounds in peer_rounds.items():
            if any("error" in found for found in rounds):
                continue
            report(f"round {turn + 1} of {args.rounds}: {name}")
            layers = min(args.layers, PEER_LAYERS)
            rounds.append(
                others.measure(
                    name,
                    pythons[name],
                    layers=layers,
                    layer_mib=args.layer_mib,
                    block_kib=args.block_kib,
                    reps=min(args.reps, 3),
                )
            )
    return ucx_rounds, ucx_error, peer_rounds


def ranks(case: Case) -> str:
    """`TP 2 to 1`, and whose ranks share a process."""
    return f"TP {case.tp[0]} to {case.tp[1]}" + (", one process a side" if case.together else "")


def peer_result(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """A peer's median round: its fastest variant of each round counts."""
    for found in rounds:
        if "error" in found:
            return {"error": found["error"]}
    values = [found["gb_s"] for found in rounds]
    return {
        "gb_s": round(statistics.median(values), 3),
        "gb_s_rounds": rounded(values),
        "version": rounds[0]["version"],
        "how": rounds[0]["how"],
        "variants": {
            name: round(statistics.median(found["variants"][name] for found in rounds), 3)
            for name in rounds[0]["variants"]
        },
    }


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def attempt(what: Any) -> str | None:
    try:
        return str(what())
    except HetkvError:
        return None


def show(
    console: Any, results: list[dict[str, Any]], found: dict[str, dict[str, Any]], args: argparse.Namespace
) -> None:
    """The tables for people."""
    from rich.table import Table

    table = Table(box=None)
    heads = (
        "to",
        "TP",
        "path",
        "GB/s",
        "rounds",
        "of 1:1",
        "of UCX",
        *(f"x {name}" for name in found),
        "call",
        "rest",
    )
    for head in heads:
        table.add_column(head)
    for row in results:
        table.add_row(
            row["destination"],
            ":".join(map(str, row["tp"])) + (" *" if row["processes"] == "side" else ""),
            row["path"],
            f"{row['hetkv_gb_s']:.2f}",
            spread(row["hetkv_gb_s_rounds"]),
            f"{row['ratio_unsharded']:.2f}",
            "" if row["ratio_ucx"] is None else f"{row['ratio_ucx']:.2f}",
            *("" if row[f"ratio_{name}"] is None else f"{row[f'ratio_{name}']:.2f}" for name in found),
            f"{row['cpu_s_per_gb']:.2f}",
            f"{row['send_layer_us']:.1f} us",
            f"{max(row['idle_cpu_percent']):.2f} %",
        )
    console.print(table)
    if any(row["processes"] == "side" for row in results):
        console.print("*: all ranks of a side in one process; else one process a rank")
    console.print(
        "CPU: all processes; call: median time of send_layer; rest: a process's share of a core while nothing is sent"
    )
    compared = Table("compared with", "GB/s", "rounds", "how", box=None)
    first = results[0]
    if first["ucx_gb_s"] is not None:
        compared.add_row(
            "UCX put", f"{first['ucx_gb_s']:.2f}", spread(first["ucx_gb_s_rounds"]), "one contiguous layer"
        )
    else:
        compared.add_row("UCX put", "", "", first["ucx_error"])
    for name, peer in found.items():
        if "error" in peer:
            compared.add_row(name, "", "", peer["error"])
        else:
            compared.add_row(
                f"{name} {peer['version']}", f"{peer['gb_s']:.2f}", spread(peer["gb_s_rounds"]), peer["how"]
            )
    console.print(compared)


def spread(rounds: list[float]) -> str:
    """The slowest and the fastest round."""
    return f"{min(rounds):.2f}-{max(rounds):.2f}"
