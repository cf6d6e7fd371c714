"""Measurements of hetkv's parts: the modules of `hetkv bench` and `hetkv probe`.

Each command has `add_arguments(parser)` and `run(args) -> int`. May import `hetkv.transport` and `hetkv.runtime`.
"""
