"""What logs show of an engine: periods of steps, and prompts that did not wait."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setup:
    """What a log does not say: on what, and how, the engine ran. `chunk`: `max_num_batched_tokens`."""

    gpu: str
    model: str
    engine: str
    version: str
    dtype: str
    tp: int = 1
    dp: int = 1
    chunk: int = 8192


@dataclass(frozen=True)
class Period:
    """Steps over `seconds`, in which `running` sequences that held `context` tokens emitted `output` tokens.

    `prompt` prompt tokens of `prompts` requests were computed in the same steps. Counts are means over the period.
    """

    seconds: float
    running: float
    context: float
    output: float
    prompt: float = 0.0
    prompts: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """`tokens` prompt tokens took `seconds` to the first token while `running` sequences held `context` tokens."""

    seconds: float
    tokens: float
    running: float = 0.0
    context: float = 0.0


Observation = Period | Prompt
