"""Model names as people write them: the shipped model of the same shape, or a question, never another shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from hetkv.errors import InputError

SAME_SHAPE = {
    "llama-3.3-70b": "Llama-3.1-70B",
    "mistral-7b-v0.3": "Mistral-7B",
    "mistral-7b-instruct-v0.3": "Mistral-7B",
    "deepseek-v3-0324": "DeepSeek-V3",
    "deepseek-r1-0528": "DeepSeek-R1",
}
"""Names of other weights in the same shape, after the suffixes below are gone. Dates are here, one by one: a later
release may have the shape of the earlier one (DeepSeek-V3-0324) or a longer context (Qwen3-235B-A22B-2507)."""

SAME_WEIGHTS_SHAPE = (
    "instruct", "chat", "it", "base", "thinking", "hf", "fp8", "fp4", "nvfp4", "mxfp4", "bf16", "fp16", "int8", "int4",
    "awq", "gptq", "gguf", "dynamic", "block", "kv", "quantized", "w8a8", "w4a16", "w8a16", "bnb", "4bit", "8bit",
)  # fmt: skip
"""Words after a name that say how the weights were trained further or are stored; the layers stay as they are."""


def resolve(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` means: a hub id, a cache folder's name, or a tag such as `llama3.1:8b`.

    Only words that leave the shape alone are dropped from the end. Anything else raises `InputError`, which asks
    whether a similar model is meant: `DeepSeek-R1-Distill-Llama-8B` is no DeepSeek-R1.
    """
    names = {_plain(each): each for each in known}
    words = _plain(re.split(r"/|--", name.rstrip("/"))[-1])
    while True:
        found = names.get(words) or names.get(_plain(SAME_SHAPE.get(words, "")))
        if found:
            return found
        shorter, _, last = words.rpartition("-")
        if not shorter or last not in SAME_WEIGHTS_SHAPE:
            break
        words = shorter
    near = [each for plain, each in names.items() if words.startswith(f"{plain}-")]
    near = near or [names[each] for each in get_close_matches(words, names, 1, 0.8)]
    question = f"is its shape that of {near[0]}? Then name that one, else give" if near else "give"
    raise InputError(
        f"unknown model {name!r}: {question} its config.json; known are {', '.join(sorted(names.values()))}"
    )


def _plain(name: str) -> str:
    """Lower case, `-` between words, family and version separated (`llama3.1:8b`: `llama-3.1-8b`), no `meta-`."""
    plain = re.sub(r"[\s_:]+", "-", name.strip().lower()).removeprefix("meta-")
    return re.sub(r"^([a-z]+)-?(\d)", r"\1-\2", plain)
