"""A thin Llama-family decoder over paged KV: it shows the transport, and is checked against `transformers`.

`Decoder.load` reads a Hugging Face directory; `Pages` is one sequence's place in a `KVPool`; `generate` runs both.
"""

from hetkv.runtime.config import ModelConfig, read_config
from hetkv.runtime.generate import choose, decode, generate, greedy, prefill
from hetkv.runtime.model import Decoder, Span
from hetkv.runtime.paged import BlockAllocator, Pages, PoolFull
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.part import Part
from hetkv.runtime.tokenizer import TextTokenizer

__all__ = [
    "BlockAllocator",
    "Decoder",
    "ModelConfig",
    "Pages",
    "ParallelGroup",
    "Part",
    "PoolFull",
    "Span",
    "TextTokenizer",
    "choose",
    "decode",
    "generate",
    "greedy",
    "prefill",
    "read_config",
]
