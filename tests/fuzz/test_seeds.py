"""The seeds in the tree are those that seeds.py writes, so that they follow the wire and the control channel."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.seeds import main

SEEDS = Path(__file__).parent / "seeds"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_seeds_are_what_the_program_writes(tmp_path: Path) -> None:
    main(tmp_path)
    assert files(tmp_path) == files(SEEDS)
