"""`hetkv demo --prefill-engine X --decode-engine Y`: one engine computes a prompt, another goes on from its KV."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from hetkv import terminal
from hetkv.errors import InputError

if TYPE_CHECKING:
    from hetkv.integrations.pairs import PairResult

TOKENS = 64
SLOTS = 2
NOT_FOR_ENGINES = (
    "shape", "prefill", "decode", "plan", "requests", "reference", "chunk", "threads", "plot", "trace", "compute_dtype",
    "plain_greedy",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the demo with engines."""
    group = parser.add_argument_group("engines, each in an interpreter of its own (docs/engines.md)")
    for role in ("prefill", "decode"):
        group.add_argument(
            f"--{role}-engine", metavar="NAME", help="reference, transformers, vllm, llama.cpp or mlx, in float32"
        )
        group.add_argument(
            f"--{role}-python",
            metavar="FILE",
            help="interpreter that has it (default: this one)",
        )


def wanted(args: argparse.Namespace) -> bool:
    """Whether the options ask for engines. Raises `InputError` for one engine alone, and for an interpreter of none."""
    names = [args.prefill_engine, args.decode_engine]
    if any(names) and not all(names):
        raise InputError("--prefill-engine and --decode-engine go together")
    for role in ("prefill", "decode"):
        if not any(names) and getattr(args, f"{role}_python") is not None:
            raise InputError(f"--{role}-python goes with --{role}-engine")
    return all(names)


def run(args: argparse.Namespace, prompts: list[str]) -> int:
    """Run all prompts through the pair; 0 where all tokens are those of the decode engine alone, 1 where not."""
    from pathlib import Path

    from hetkv.integrations.pairs import Pairs, Side, engines
    from hetkv.runtime.demo import MODEL
    from hetkv.runtime.tokenizer import TextTokenizer

    for name in NOT_FOR_ENGINES:
        if getattr(args, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} does not go with --prefill-engine")
    model = str(Path(args.model or MODEL).absolute())
    tokenizer = TextTokenizer.load(model)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    count = args.tokens or TOKENS
    room = {"capacity": -(-(max(map(len, ids)) + count) // 256) * 256, "slots": SLOTS}
    sides = {
        "prefill": Side(engine=args.prefill_engine, python=args.prefill_python or sys.executable),
        "decode": Side(engine=args.decode_engine, python=args.decode_python or sys.executable),
    }
    console = terminal.console(args.json)
    with terminal.progress(f"starting {args.prefill_engine} and {args.decode_engine}"):
        with engines(model, sides, [("prefill", "decode")], room) as processes:
            facts = {role: process.call("facts") for role, process in processes.items()}
            pairs = Pairs(processes, count, distributions=2)
            result = pairs.run("prefill", "decode", ids, args.rendezvous or "concurrent")
    if args.json:
        terminal.write_json(args.json, _document(args, result, facts))
    _show(console, args, result, prompts, tokenizer.decode(result.requests[0].tokens))
    return 0 if result.identical == len(result.requests) else 1


def _document(args: argparse.Namespace, result: PairResult, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts for machines."""
    import msgspec

    return {
        "prefill": {"engine": args.prefill_engine, **facts["prefill"]},
        "decode": {"engine": args.decode_engine, **facts["decode"]},
        "identical": result.identical,
        "requests": [msgspec.to_builtins(request) for request in result.requests],
    }


def _show(console: Any, args: argparse.Namespace, result: PairResult, prompts: list[str], text: str) -> None:
    from rich.table import Table

    console.print(f"[bold]{args.prefill_engine}[/] prefills, [bold]{args.decode_engine}[/] decodes", highlight=False)
    console.print(f"{prompts[0]}[green]{text}[/]", highlight=False, markup=True)
    table = Table("prompt tokens", "tokens", "against the decode engine alone", "KL", "TTFT", "TTFT alone")
    for request in result.requests:
        same = request.first_difference is None
        table.add_row(
            str(request.prompt_tokens),
            str(len(request.tokens)),
            "identical" if same else f"differ from token {request.first_difference} on",
            "" if request.kl is None else f"{request.kl:.1e}",
            f"{request.ttft_ms:.1f} ms",
            f"{request.alone_ms:.1f} ms",
        )
    console.print(table)
