"""The `hetkv` command: one module of this package per subcommand, imported only when it is asked for.

A subcommand module has `add_arguments(parser)` and `run(args) -> int`. Bad input is a `hetkv.errors.HetkvError`
(or `OSError` for files): it prints one line and the command exits with 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

COMMANDS: dict[str, str] = {
    "demo": "generate text through a prefill and a decode process with unlike KV pools",
    "bench": "measure hetkv on this machine, as ratios within one run",
    "probe": "show the path, lanes and rates that hetkv gets here, or to another host",
    "calibrate": "fit the cost model to measurements; report how well it predicts",
    "plan": "find what to buy for a traffic and its targets, and how to split it into prefill and decode",
    "simulate": "simulate a deployment under a given traffic: latencies, goodput, utilisation, cost",
}

OUTPUTS = ("json", "plot", "report")
"""Options that name a file to write, in whatever command has them."""


def check_outputs(files: Mapping[str, str | Path | None]) -> None:
    """Raise `InputError` for an output (by option name) that cannot be a file: before the work, not after it."""
    from hetkv.errors import InputError

    for name, file in files.items():
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise InputError(f"--{name} {file}: there is no folder {Path(file).parent}")
        if file is not None and Path(file).is_dir():
            raise InputError(f"--{name} {file}: a folder, where a file is written")


def main(argv: list[str] | None = None) -> int:
    """Run `hetkv` with `argv` (default: the process's own arguments) and return its exit status."""
    import hetkv
    from hetkv.errors import HetkvError

    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="hetkv",
        description="Moves and converts the KV cache between unlike GPUs, plans and simulates deployments.",
    )
    parser.add_argument("--version", action="version", version=f"hetkv {hetkv.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for name, summary in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            if argv and argv[0] == name:
                import_module(f"hetkv.cli.{name}").add_arguments(command)
        args = parser.parse_args(argv)
        check_outputs({name: getattr(args, name, None) for name in OUTPUTS})
        return int(import_module(f"hetkv.cli.{args.command}").run(args))
    except HetkvError as error:
        text = str(error)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        return 130
    print(f"hetkv {argv[0]}: {text}", file=sys.stderr)
    return 2
