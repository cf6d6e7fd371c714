"""Measurements of hetkv's parts. Each is a module with `add_arguments(parser)` and `run(args) -> int`."""
