"""`hetkv demo`: prefill and decode instances with different KV pools generate the text that one process generates.

With `--shape` they have random weights of a named shape, and only times are shown.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hetkv import terminal
from hetkv.cli import demo_engines
from hetkv.errors import InputError

if TYPE_CHECKING:
    from hetkv.runtime.demo import DemoResult
    from hetkv.runtime.plan import InstancePlan
    from hetkv.runtime.timeline import Span
    from hetkv.runtime.timing import TimingResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv demo`."""
    from hetkv.runtime.plan import DECODE_POOL, GRAMMAR, LAYOUTS, PREFILL_POOL

    parser.add_argument(
        "--model", metavar="DIR", help="a Hugging Face directory (docs/models.md; default: hetkv's own)"
    )
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="repeat it for several requests")
    parser.add_argument("--prompts", metavar="FILE", help="one a line: text, or JSON where FILE ends in .jsonl")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's message in the model's chat template")
    parser.add_argument(
        "--reference",
        choices=["transformers", "self", "none"],
        help="what the tokens are compared with: transformers in fp32, or one process of hetkv (default: the first "
        "that is there)",
    )
    parser.add_argument(
        "--plain-greedy", action="store_true", help="leave out penalties and the like of generation_config.json"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to generate (default 96; 16 of a shape)")
    timed = parser.add_argument_group("random weights of a named shape, for timing alone")
    timed.add_argument("--shape", metavar="NAME", help="llama-2-7b, llama-3-70b or qwen3-32b")
    timed.add_argument("--layers", type=int, metavar="N", help="its first N layers alone (default: all)")
    timed.add_argument("--prompt-tokens", type=int, metavar="N", help="random tokens of the prompt (default 1024)")
    which = parser.add_argument_group("which instances (default: one of one rank on either side)")
    for name in ("prefill", "decode"):
        which.add_argument(
            f"--{name}", metavar="SHAPE", help=f"{GRAMMAR}: N instances of TP a, PP b; stages of l layers (2xTP2)"
        )
    which.add_argument(
        "--plan", metavar="FILE", help="instances of a plan.yaml: roles, counts, TP, PP, blocks, layouts"
    )
    which.add_argument(
        "--requests", type=int, metavar="N", help="default: one for each pair of instances, of a shape 5"
    )
    pools = parser.add_argument_group("their pools (a plan's own choices win)")
    for name, side in (("prefill", PREFILL_POOL), ("decode", DECODE_POOL)):
        pools.add_argument(
            f"--{name}-block",
            type=int,
            default=side.block_size,
            metavar="N",
            help=f"tokens a block (default {side.block_size})",
        )
        pools.add_argument(f"--{name}-layout", choices=LAYOUTS, default=side.layout, help=f"default {side.layout}")
        pools.add_argument(
            f"--{name}-dtype", default=side.dtype, metavar="DTYPE", help=f"of the KV pool (default {side.dtype})"
        )
        pools.add_argument(
            f"--{name}-device", default="cpu", metavar="DEVICE", help="cpu, or cuda:N of its first rank (default cpu)"
        )
    demo_engines.add_arguments(parser)
    parser.add_argument("--compute-dtype", metavar="DTYPE", help="default float32; bfloat16 of a shape")
    parser.add_argument("--chunk", type=int, metavar="N", help="prefill in chunks of N tokens")
    parser.add_argument("--rendezvous", choices=["concurrent", "prefill_first"])
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads of a rank (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write the facts for machines")
    parser.add_argument("--plot", metavar="FILE", help="draw the first request's timeline (.svg, .png, .pdf)")
    parser.add_argument("--trace", metavar="FILE", help="write all timelines as a trace for Perfetto")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 where all tokens are the reference's, or differ by the pools' rounding alone, 1 where not."""
    from hetkv.cli import demo_output
    from hetkv.runtime.checkpoint import read_checkpoint
    from hetkv.runtime.demo import DemoOptions, run_demo

    terminal.check_outputs({"trace": args.trace})
    if demo_engines.wanted(args):
        given = _prompts(args).get("prompts", DemoOptions().prompts)
        if any(prompt.messages is not None for prompt in given):
            raise InputError("engines take prompts that are texts")
        return demo_engines.run(args, [prompt.text for prompt in given])
    instances = _instances(args)
    if args.shape is not None:
        return _run_timing(args, instances)
    for name in ("layers", "prompt_tokens"):
        if getattr(args, name) is not None:
            raise InputError(f"{_option(name)} goes with --shape")
    options = DemoOptions(
        instances=tuple(instances),
        requests=args.requests,
        chunk=args.chunk,
        plain_greedy=args.plain_greedy,
        **_prompts(args),
        **_given(
            args,
            rendezvous="rendezvous",
            threads="threads",
            model="model",
            reference="reference",
            max_new_tokens="tokens",
            compute_dtype="compute_dtype",
        ),
    )
    console = terminal.console(args.json)
    ranks = sum(instance.ranks for instance in instances)
    what = "a prefill and a decode process" if ranks == 2 else f"{len(instances)} instances, {ranks} processes"
    with terminal.progress(f"starting {what}"), _ended_in_order():
        result, timelines = run_demo(options)
    if ranks == 2 and len(result.requests) == 1:
        demo_output.show_pair(console, result)
    else:
        demo_output.show_deployment(console, result, read_checkpoint(options.model))
    demo_output.show_figures(console, result)
    _write(args, result, timelines, result.requests[0].prompt_tokens)
    if result.same_prompt_ids is False:
        print("hetkv demo: transformers' own tokenizer makes other tokens of the prompts", file=sys.stderr)
    if result.outcome == "different":
        name = demo_output.REFERENCES[result.reference]
        print(f"hetkv demo: the tokens differ from those of {name}", file=sys.stderr)
    return 1 if result.outcome == "different" else 0


def _prompts(args: argparse.Namespace) -> dict[str, Any]:
    """The prompts that were given, if any."""
    from hetkv.runtime.prompts import Prompt, read_prompts, user

    if args.prompt is not None and args.prompts is not None:
        raise InputError("--prompt and --prompts: give one of them")
    if args.prompts is not None:
        return {"prompts": tuple(read_prompts(args.prompts, args.chat))}
    if args.prompt is None:
        if args.chat:
            raise InputError("--chat goes with --prompt or --prompts")
        return {}
    return {"prompts": tuple(map(user if args.chat else Prompt, args.prompt))}


def _run_timing(args: argparse.Namespace, instances: list[InstancePlan]) -> int:
    from hetkv.cli import demo_output
    from hetkv.runtime.timing import TimingOptions, run_timing

    for name in ("model", "prompt", "prompts", "chat", "reference", "prefill", "decode", "plan"):
        if getattr(args, name) not in (None, False):
            raise InputError(
                f"{_option(name)} does not go with --shape: random weights, one prefill and one decode rank"
            )
    prefill, decode = instances
    options = TimingOptions(
        shape=args.shape,
        layers=args.layers,
        prefill=prefill,
        decode=decode,
        chunk=args.chunk,
        **_given(
            args,
            rendezvous="rendezvous",
            threads="threads",
            prompt_tokens="prompt_tokens",
            new_tokens="tokens",
            requests="requests",
            compute_dtype="compute_dtype",
        ),
    )
    with terminal.progress(f"timing {args.shape}"), _ended_in_order():
        result, timelines = run_timing(options)
    console, table = terminal.console(args.json), demo_output.figures()
    table.add_row(
        "model",
        f"{result.layers} layers of {result.shape}, random {result.compute_dtype} weights, "
        f"{result.weight_bytes / 1e9:.1f} GB a side",
    )
    for role, device in zip(("prefill", "decode"), result.devices, strict=True):
        table.add_row(role, f"{device}, pool {getattr(result, role)}")
    count = f"{len(result.requests)} of {result.prompt_tokens} tokens and {result.generated_tokens} new ones"
    table.add_row("requests", f"{count}; times are medians")
    demo_output.add_times(table, result)
    console.print(table)
    _write(args, result, timelines, result.prompt_tokens)
    return 0


def _given(args: argparse.Namespace, **options: str) -> dict[str, Any]:
    """Those options (field: option) that the command line names."""
    return {field: getattr(args, name) for field, name in options.items() if getattr(args, name) is not None}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _write(
    args: argparse.Namespace, result: DemoResult | TimingResult, timelines: list[list[Span]], prompt_tokens: int
) -> None:
    """The files that were asked for."""
    import msgspec

    from hetkv.runtime.timeline import draw, write_perfetto

    if args.json:
        terminal.write_text(args.json, msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
    if args.trace:
        write_perfetto(args.trace, [span for timeline in timelines for span in timeline])
    if args.plot:
        sides = f"{result.prefill} to {result.decode}"
        draw(args.plot, timelines[0], f"KV of {prompt_tokens} tokens, {sides}, {result.rendezvous}")


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the command as Ctrl-C does: with all that it started."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _instances(args: argparse.Namespace) -> list[InstancePlan]:
    import msgspec

    from hetkv.runtime.plan import SideOptions, parse_side, read_plan

    pools = {
        role: SideOptions(
            block_size=getattr(args, f"{role}_block"),
            layout=getattr(args, f"{role}_layout"),
            dtype=getattr(args, f"{role}_dtype"),
        )
        for role in ("prefill", "decode")
    }
    if args.plan is not None:
        if args.prefill is not None or args.decode is not None:
            raise InputError("--plan says which instances there are: leave out --prefill and --decode")
        return read_plan(args.plan, pools["prefill"], pools["decode"])
    return [
        msgspec.structs.replace(instance, device=getattr(args, f"{role}_device"))
        for role, pool in pools.items()
        for instance in parse_side(getattr(args, role) or "TP1", role, pool)
    ]
