"""The training text: the King James Bible as chapters, from Debian's `bible-kjv` and `bible-kjv-text` packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

WHOLE_BIBLE = "gen1:1-rev22:21"
VERSE = re.compile(r"^(\w+?)(\d+):(\d+) (.+)$")


def read_verses(path: Path | None) -> str:
    """One verse a line, `Ge1:1 In the beginning ...`: from `path`, or from the `bible` command where `path` is None."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    if shutil.which("bible") is None:
        raise SystemExit("train: no `bible` command: apt-get install bible-kjv bible-kjv-text, or give --text FILE")
    done = subprocess.run(["bible", "-f", WHOLE_BIBLE], capture_output=True, text=True, check=True)
    return done.stdout


def split_chapters(verses: str) -> list[tuple[str, str]]:
    """(name, text) of every chapter in order, such as ("Ge1", ...). Verses are lines, without references."""
    chapters: dict[str, list[str]] = {}
    for number, line in enumerate(verses.splitlines(), start=1):
        match = VERSE.match(line)
        if match is None:
            raise SystemExit(f"train: line {number} of the text is not `Book1:1 words`: {line[:60]!r}")
        book, chapter, _, words = match.groups()
        chapters.setdefault(book + chapter, []).append(" ".join(words.split()))
    return [(name, "\n".join(lines)) for name, lines in chapters.items()]


def hold_out(chapters: list[tuple[str, str]], every: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) chapters. Every `every`-th chapter is held out, so all books are represented."""
    training = [chapter for index, chapter in enumerate(chapters) if index % every != every - 1]
    held_out = [chapter for index, chapter in enumerate(chapters) if index % every == every - 1]
    return training, held_out
