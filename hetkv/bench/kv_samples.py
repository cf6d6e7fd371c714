"""KV to code: a checkpoint's, computed by transformers, and random values; as the wire has it, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

TOKENS, HEADS, HEAD_DIM = 1000, 8, 128
"""Of the random sample; `TOKENS` of the checkpoint's, too, or as many as it takes."""
DTYPES: dict[str, Literal["bf16", "fp16"]] = {"bfloat16": "bf16", "float16": "fp16"}


class Sample(NamedTuple):
    """Payloads of a model, `[layer][segment][head][token][channel]`."""

    name: str
    dtype: Literal["bf16", "fp16"]
    values: Any
    """A tensor `[parts, heads, tokens, channels]`, a part for K and V of each layer."""

    @property
    def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The same bytes."""
        import torch

        found: np.ndarray[Any, np.dtype[np.uint8]] = self.values.contiguous().view(torch.uint8).numpy().reshape(-1)
        return found


def samples(model: Path | None) -> Iterator[Sample]:
    """The checkpoint's KV where transformers is installed, and random values, in bfloat16 and in float16."""
    import torch

    parts = [("random", torch.randn(4, HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0)))]
    found = _of_checkpoint(model)
    if found is not None:
        parts.insert(0, (model.name if model else "demo checkpoint", found))
    for name, values in parts:
        for dtype, short in DTYPES.items():
            yield Sample(name, short, values.to(getattr(torch, dtype)))


def _of_checkpoint(model: Path | None) -> Any:
    """`[2 x layers, heads, tokens, channels]` of a text that the model itself goes on with, at random."""
    try:
        import transformers
    except ImportError:
        return None
    import torch

    from hetkv.runtime.demo import MODEL, PROMPT

    directory = model or MODEL
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    network = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.manual_seed(0)
    made = network.generate(
        **tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False),
        max_length=TOKENS,
        min_length=TOKENS,
        do_sample=True,
        return_dict_in_generate=True,
    )
    return torch.cat([torch.cat((layer.keys, layer.values)) for layer in made.past_key_values.layers])
