"""What of vLLM's settings this connector does not serve: rejected at start, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetkv.engines import VLLM_CONNECTOR
from hetkv.errors import InputError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PARALLEL = {
    "pipeline_parallel_size": VLLM_CONNECTOR.pp,
    "data_parallel_size": VLLM_CONNECTOR.dp,
    "decode_context_parallel_size": 1,
    "prefill_context_parallel_size": 1,
}
"""Fields of vLLM's parallel configuration, and the most that is served."""
SHORT = {"-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size", "-sc": "--speculative-config",
         "-dcp": "--decode-context-parallel-size", "-pcp": "--prefill-context-parallel-size"}  # fmt: skip
SPECULATIVE = "speculative decoding has not been shown to work with this connector: a draft model has caches of its own"
SLEEP = "sleep mode needs vLLM 0.33: before it a connector does not hear that its caches' memory goes"


def check_config(config: VllmConfig, sleeps: bool) -> None:
    """Raise `InputError` for what cannot be served. `sleeps`: this vLLM says when its caches' memory goes."""
    for field, most in PARALLEL.items():
        _check_size(field, getattr(config.parallel_config, field), most)
    if config.speculative_config is not None:
        raise InputError(SPECULATIVE)
    if config.model_config.enable_sleep_mode and not sleeps:
        raise InputError(SLEEP)


def check_arguments(arguments: Sequence[str]) -> None:
    """The same of a server's command line, before a model is loaded, as far as it says so."""
    options = {f"--{field.replace('_', '-')}": field for field in PARALLEL}
    for at, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        name = SHORT.get(name, name.replace("_", "-"))
        if name == "--speculative-config":
            raise InputError(SPECULATIVE)
        if name not in options:
            continue
        text = value if "=" in argument else "".join(arguments[at + 1 : at + 2])
        if text.isdecimal():  # anything else is vLLM's to reject
            _check_size(options[name], int(text), PARALLEL[options[name]])


def _check_size(field: str, size: int, most: int) -> None:
    if size > most:
        raise InputError(f"{field} is {size}: this connector takes {most}")
