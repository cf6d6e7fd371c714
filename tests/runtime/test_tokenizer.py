"""Long texts, encoded while other threads run."""

from __future__ import annotations

import threading
from pathlib import Path

from hetkv.runtime.tokenizer import LONG_TEXT, TextTokenizer

DEMO = Path(__file__).parents[2] / "hetkv" / "runtime" / "data" / "demo"


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
