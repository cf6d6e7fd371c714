"""`hetkv demo`: a prefill and a decode process with unlike KV pools generate the text that one process generates."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from hetkv.cli import check_outputs
from hetkv.layout import PRESETS
from hetkv.runtime.demo import DemoOptions, DemoResult, SideOptions, run_demo
from hetkv.trace import draw, write_perfetto

_LAYOUTS = [name for name in PRESETS if name not in ("latent", "state")]
_SIDE_OPTIONS = {"block_size": "block", "layout": "layout", "dtype": "dtype"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv demo`."""
    defaults = DemoOptions()
    parser.add_argument("--plan", metavar="FILE", help="plan.yaml: block sizes, dtypes and layouts of its two sides")
    parser.add_argument("--model", default=defaults.model, metavar="DIR", help="a Hugging Face Llama-family directory")
    parser.add_argument("--prompt", default=defaults.prompt, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=defaults.max_new_tokens, metavar="N", help="tokens to generate")
    for name, side in (("prefill", defaults.prefill), ("decode", defaults.decode)):
        parser.add_argument(
            f"--{name}-block", type=int, metavar="N", help=f"tokens a block (default {side.block_size})"
        )
        parser.add_argument(f"--{name}-layout", choices=_LAYOUTS, help=f"of the KV pool ({side.layout})")
        parser.add_argument(f"--{name}-dtype", metavar="DTYPE", help=f"of the KV pool ({side.dtype})")
    parser.add_argument("--compute-dtype", default=defaults.compute_dtype, metavar="DTYPE")
    parser.add_argument("--chunk", type=int, metavar="N", help="prefill in chunks of N tokens")
    parser.add_argument("--rendezvous", choices=["concurrent", "prefill_first"], default=defaults.rendezvous)
    parser.add_argument(
        "--threads", type=int, default=defaults.threads, metavar="N", help="compute threads of each worker"
    )
    parser.add_argument("--json", metavar="FILE", help="write the facts for machines")
    parser.add_argument("--plot", metavar="FILE", help="draw the layer timeline (.svg, .png, .pdf)")
    parser.add_argument("--trace", metavar="FILE", help="write the timeline as a trace for Perfetto")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 where the two texts are identical, 1 where not."""
    check_outputs({"trace": args.trace})
    sides = _sides(args)
    options = DemoOptions(
        model=args.model,
        prompt=args.prompt,
        max_new_tokens=args.tokens,
        prefill=sides[0],
        decode=sides[1],
        compute_dtype=args.compute_dtype,
        chunk=args.chunk,
        rendezvous=args.rendezvous,
        threads=args.threads,
    )
    console = Console(highlight=False)
    with Console(stderr=True).status("starting a prefill and a decode process"):
        result, spans = run_demo(options)
    _show(console, options, result)
    if args.json:
        Path(args.json).write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    if args.trace:
        write_perfetto(args.trace, spans)
    if args.plot:
        names = f"{_side(options.prefill)} to {_side(options.decode)}"
        draw(args.plot, spans, f"KV of {result.prompt_tokens} tokens, {names}, {result.rendezvous}")
    if not result.identical:
        print("hetkv demo: the two texts differ", file=sys.stderr)
    return 0 if result.identical else 1


def _sides(args: argparse.Namespace) -> tuple[SideOptions, SideOptions]:
    """The two sides: the defaults, or the plan's; options of the command line over them."""
    defaults = DemoOptions()
    sides = (defaults.prefill, defaults.decode)
    if args.plan:
        from hetkv.runtime.planned import sides_of_plan

        sides = sides_of_plan(args.plan)
    found = []
    for name, side in zip(("prefill", "decode"), sides, strict=True):
        given = {field: getattr(args, f"{name}_{option}") for field, option in _SIDE_OPTIONS.items()}
        found.append(msgspec.structs.replace(side, **{k: v for k, v in given.items() if v is not None}))
    return found[0], found[1]


def _side(side: SideOptions) -> str:
    return f"{side.dtype} block {side.block_size} {side.layout}"


def _show(console: Console, options: DemoOptions, result: DemoResult) -> None:
    console.print(f"[bold]prompt[/]          {options.prompt}")
    console.print(f"[bold]two processes[/]   {result.text.strip()}")
    console.print(f"[bold]one process[/]     {result.single_process_text.strip()}")
    verdict = "[green]identical[/]" if result.identical else "[red]different[/]"
    console.print(f"[bold]{result.generated_tokens} tokens[/]       {verdict}\n")
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("prefill pool", _side(result.prefill))
    table.add_row("decode pool", _side(result.decode))
    table.add_row(
        "moved",
        f"{result.payload_bytes / 1024:.0f} KiB of {result.layers} layers in {result.frames} frames, "
        f"{result.direct_frames} straight into the window",
    )
    table.add_row("TTFT", f"{result.ttft_ms:.1f} ms, of which prefill {result.prefill_ms:.1f} ms")
    table.add_row(
        "transfer",
        f"{result.transfer_ms:.1f} ms, of which exposed behind the prefill {result.exposed_transfer_ms:.2f} ms",
    )
    table.add_row("TPOT", f"{result.tpot_ms:.2f} ms")
    console.print(table)
