"""Bounds of a tokenizer, and long texts in other threads."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from hetkv.runtime.tokenizer import LONG_TEXT, TextTokenizer, TokenIds

DEMO = Path(__file__).parents[2] / "hetkv" / "runtime" / "data" / "demo"
ALPHABETS = [
    "abc ",
    " ",
    "\n\t",
    "é\u0301\u1f82",
    "漢字かな",
    "🙂\U0001f468\u200d\U0001f469",
    "0123456789",
    "And it came to pass ",
]


def changed(**changes: Any) -> TextTokenizer:
    """The demo's, with other parts."""
    document = json.loads((DEMO / "tokenizer.json").read_text())
    return TextTokenizer(Tokenizer.from_str(json.dumps({**document, **changes})))


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {"type": "NFC"},
        {"type": "Prepend", "prepend": "x"},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "_"}]},
    ],
)
def test_no_token_stands_for_more_characters(normalizer: Any) -> None:
    tokenizer, draw = changed(normalizer=normalizer), random.Random(1)
    most = tokenizer.most_characters
    assert most is not None
    for alphabet in ALPHABETS:
        for length in (1, 30, 3000):
            text = "".join(draw.choice(alphabet) for _ in range(length))
            assert len(text) <= most * len(tokenizer.encode(text, special_tokens=False))
        assert len(alphabet * 500) <= most * len(tokenizer.encode(alphabet * 500, special_tokens=False))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"added_tokens": [{"id": 0, "content": "<s>", "single_word": False, "lstrip": True, "rstrip": False,
                           "normalized": False, "special": True}]},
    ],
)  # fmt: skip
def test_there_is_no_bound_where_characters_may_be_left_out(changes: dict[str, Any]) -> None:
    assert changed(**changes).most_characters is None
    assert TokenIds(10).most_characters is None


def test_a_long_text_is_encoded_as_a_short_one_and_lets_other_threads_run() -> None:
    tokenizer, words = TextTokenizer.load(DEMO), "In the beginning, 17 words: é 漢字 "
    text = words * 40_000
    for special in (True, False):
        longer = words * (LONG_TEXT // len(words) + 1)
        expected = tokenizer._tokenizer.encode(longer, add_special_tokens=special).ids
        assert tokenizer.encode(longer, special) == expected
    ran, done = 0, threading.Event()
    thread = threading.Thread(target=lambda: (tokenizer.encode(text), done.set()))
    thread.start()
    while not done.wait(0.001):
        ran += 1
    thread.join()
    assert ran > 10
