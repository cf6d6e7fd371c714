"""The `hetkv` command: one module per subcommand, imported when it is asked for, with `add_arguments` and `run`.

May import everything, but only inside functions: `add_arguments` works without any extra. Bad input is a `HetkvError`
(or `OSError` for files): it prints one line and the command exits with 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple


class Command(NamedTuple):
    """One subcommand."""

    summary: str
    extra: str
    """The extra that brings what it needs beyond the transport."""
    modules: tuple[str, ...]
    """Those needs; what only some options need is not listed."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "generate text through a prefill and a decode process with different KV pools",
        "runtime",
        ("torch", "safetensors", "tokenizers", "rich"),
    ),
    "bench": Command("measure hetkv on this machine, as ratios within one run", "bench", ("torch", "rich")),
    "probe": Command(
        "show the path, lanes and rates that hetkv gets here, or to another host", "bench", ("torch", "rich")
    ),
    "doctor": Command(
        "try each lane of this host, and say what limits it and what to change", "bench", ("torch", "rich")
    ),
    "calibrate": Command(
        "fit the cost model to measurements; report how well it predicts", "plan", ("scipy", "yaml", "rich")
    ),
    "plan": Command(
        "find what to buy for a traffic and its targets, and how to split it into prefill and decode",
        "plan",
        ("scipy", "yaml", "joblib", "rich"),
    ),
    "loadtest": Command(
        "send a traffic to a running OpenAI-compatible server, and measure it as the simulator counts",
        "serve",
        ("aiohttp", "yaml", "rich"),
    ),
    "serve": Command(
        "serve a model over instances that prefill and decode, with an OpenAI-compatible server",
        "serve",
        ("torch", "safetensors", "tokenizers", "fastapi", "uvicorn", "prometheus_client", "rich"),
    ),
    "simulate": Command(
        "simulate a deployment under a given traffic: latencies, goodput, utilisation, cost",
        "plan",
        ("yaml", "joblib", "rich"),
    ),
    "proxy": Command(
        "route requests to vLLM servers that prefill and vLLM servers that decode",
        "proxy",
        ("fastapi", "httpx", "uvicorn"),
    ),
}

OUTPUTS = ("json", "plot", "report")
"""Options that name a file to write, in whatever command has them."""

EXTRAS = {"joblib": "plan", "matplotlib": "plot", "prometheus_client": "metrics", "rich": "cli", "yaml": "plan"}
"""The extra that brings a module which the command itself does not need."""


def check_installed(command: str) -> None:
    """Raise `InputError`, which names the extra, where something that the command needs is not installed."""
    from hetkv.errors import InputError

    _, extra, modules = COMMANDS[command]
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f'{", ".join(missing)} {verb} not installed: pip install "hetkv[{extra}]"')


def main(argv: list[str] | None = None) -> int:
    """Run `hetkv` with `argv` (default: the process's own arguments) and return its exit status."""
    import hetkv
    from hetkv.errors import HetkvError
    from hetkv.terminal import check_outputs

    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="hetkv",
        description="Moves and converts the KV cache between heterogeneous GPUs, plans and simulates deployments.",
    )
    parser.add_argument("--version", action="version", version=f"hetkv {hetkv.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for name, what in COMMANDS.items():
            command = commands.add_parser(name, help=what.summary, description=what.summary)
            if argv and argv[0] == name:
                import_module(f"hetkv.cli.{name}").add_arguments(command)
        args = parser.parse_args(argv)
        check_installed(args.command)
        check_outputs({name: getattr(args, name, None) for name in OUTPUTS})
        return int(import_module(f"hetkv.cli.{args.command}").run(args))
    except HetkvError as error:
        text = str(error)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS and module not in COMMANDS[argv[0]].modules:
            raise  # not an extra that is missing, but an error in hetkv
        text = f'{module} is not installed: pip install "hetkv[{EXTRAS.get(module, COMMANDS[argv[0]].extra)}]"'
    except BrokenPipeError:  # the reader of standard output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"hetkv {argv[0]}: {text}", file=sys.stderr)
    return 2
