"""One sequence on an instance: its tokens, and where its keys and values are."""

from __future__ import annotations

from collections.abc import Sequence as Items

from hetkv.runtime.sampling import Sampling


class Sequence:
    """`tokens` are the prompt and what was generated since; the first `computed` of them are in the pool.

    A sequence has a next token to choose once all its tokens are computed: `target` is their number when it was
    admitted, the prompt, and after a preemption or on another instance also the tokens generated so far.
    """

    __slots__ = (
        "blocks",
        "computed",
        "generated",
        "goes_to",
        "hashes",
        "held",
        "id",
        "sampling",
        "start",
        "target",
        "tokens",
    )

    def __init__(
        self,
        id: str,
        tokens: Items[int],
        sampling: Sampling,
        *,
        generated: int = 0,
        hashes: tuple[int, ...] = (),
        goes_to: str = "",
    ) -> None:
        self.id = id
        self.tokens = list(tokens)
        self.sampling = sampling
        self.generated = generated
        """Of `tokens`, how many were generated."""
        self.hashes = hashes
        """Of its prefixes, see `prefix_hashes`."""
        self.goes_to = goes_to
        """Instance that decodes it once its tokens are computed; empty: this one."""
        self.target = len(self.tokens)
        self.computed = 0
        self.held: tuple[int, ...] = ()
        """Those of `hashes` whose blocks are shared, and the first of `blocks`."""
        self.blocks: list[int] = []
        self.start = 0
        """Tokens that were found in the prefix cache when it was admitted."""

    def __repr__(self) -> str:
        return f"Sequence({self.id!r}, {self.computed} of {len(self.tokens)} tokens computed)"
