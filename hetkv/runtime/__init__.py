"""A small reference decoder over paged KV, which shows the transport and is compared with `transformers`.

`Decoder.load` reads a Hugging Face directory; `Pages` is one sequence's place in a `KVPool`; `generate` runs both.
May import `hetkv.kv`, `hetkv.models`, `hetkv.transport` and torch. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_MODULES = {
    "BlockAllocator": "hetkv.runtime.paged",
    "Decoder": "hetkv.runtime.model",
    "ModelConfig": "hetkv.models",
    "Pages": "hetkv.runtime.paged",
    "ParallelGroup": "hetkv.runtime.parallel_group",
    "Part": "hetkv.runtime.part",
    "Span": "hetkv.runtime.batch",
    "TextTokenizer": "hetkv.runtime.tokenizer",
    "choose": "hetkv.runtime.generation",
    "decode": "hetkv.runtime.generation",
    "generate": "hetkv.runtime.generation",
    "greedy": "hetkv.runtime.generation",
    "prefill": "hetkv.runtime.generation",
    "read_checkpoint": "hetkv.runtime.checkpoint",
}

__all__ = [
    "BlockAllocator",
    "Decoder",
    "ModelConfig",
    "Pages",
    "ParallelGroup",
    "Part",
    "Span",
    "TextTokenizer",
    "choose",
    "decode",
    "generate",
    "greedy",
    "prefill",
    "read_checkpoint",
]

if TYPE_CHECKING:
    from hetkv.models import ModelConfig
    from hetkv.runtime.batch import Span
    from hetkv.runtime.checkpoint import read_checkpoint
    from hetkv.runtime.generation import choose, decode, generate, greedy, prefill
    from hetkv.runtime.model import Decoder
    from hetkv.runtime.paged import BlockAllocator, Pages
    from hetkv.runtime.parallel_group import ParallelGroup
    from hetkv.runtime.part import Part
    from hetkv.runtime.tokenizer import TextTokenizer


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'hetkv.runtime' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
