"""A small reference decoder over paged KV, which shows the transport and is compared with `transformers`.

`Decoder.load` reads a Hugging Face directory; `Pages` is one sequence's place in a `KVPool`; `generate` runs both.
May import `hetkv.kv`, `hetkv.models`, `hetkv.transport` and torch.
"""

from hetkv.models import ModelConfig
from hetkv.runtime.attention import Span
from hetkv.runtime.checkpoint import read_checkpoint
from hetkv.runtime.generate import choose, decode, generate, greedy, prefill
from hetkv.runtime.model import Decoder
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
    "read_checkpoint",
]
