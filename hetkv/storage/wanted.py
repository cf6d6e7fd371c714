"""What a pool still lacks while files are read into it: `Wanted`."""

from __future__ import annotations

from hetkv.errors import MalformedError
from hetkv.kv.spec import Interval
from hetkv.storage.form import FrameHeader


class Wanted:
    """Tokens that are missing, by layer and global head."""

    def __init__(self, layers: dict[int, tuple[Interval, Interval]]) -> None:
        """`layers`: of each the pool's heads, and the tokens that it wants."""
        self._missing = {
            (layer, head): [tokens] if tokens.size else []
            for layer, (heads, tokens) in layers.items()
            for head in range(*heads)
        }
        self._seen: dict[tuple[int, int], list[Interval]] = {}

    def begin_file(self) -> None:
        """Another file may hold the same as one before: replicas do. One file holds nothing twice."""
        self._seen = {}

    def take(self, header: FrameHeader) -> list[tuple[Interval, Interval]]:
        """Heads and tokens of a frame that are missing: they are not missing from then on.

        Raises `MalformedError` where the file has had some of the frame before.
        """
        found: dict[Interval, list[int]] = {}
        for head in range(*header.heads):
            at = header.layer, head
            seen = self._seen.setdefault(at, [])
            if any((one & header.tokens).size for one in seen):
                raise MalformedError(f"{header.text} comes twice")
            if seen and seen[-1].stop == header.tokens.start:
                seen[-1] = Interval(seen[-1].start, header.tokens.stop)
            else:
                seen.append(header.tokens)
            missing = self._missing.get(at, [])
            for one in missing:
                if (part := one & header.tokens).size:
                    found.setdefault(part, []).append(head)
            self._missing[at] = [piece for one in missing for piece in _without(one, header.tokens)]
        return [(heads, tokens) for tokens, taken in found.items() for heads in _runs(taken)]

    def lack(self) -> str | None:
        """The first that is still missing, in words."""
        for (layer, head), missing in self._missing.items():
            if missing:
                return f"layer {layer}, head {head}, tokens [{missing[0].start}, {missing[0].stop})"
        return None


def _without(one: Interval, other: Interval) -> list[Interval]:
    """What is left of an interval."""
    if not (one & other).size:
        return [one]
    parts = [Interval(one.start, other.start), Interval(other.stop, one.stop)]
    return [part for part in parts if part.size > 0]


def _runs(heads: list[int]) -> list[Interval]:
    """Rising heads as intervals."""
    runs: list[Interval] = []
    for head in heads:
        if runs and runs[-1].stop == head:
            runs[-1] = Interval(runs[-1].start, head + 1)
        else:
            runs.append(Interval(head, head + 1))
    return runs
