"""What an integration makes of its engine: an `Engine` with a pool, and a `Sequence` for each request in it.

The rest (links, tickets, content digests, what crosses besides KV, sampling) is the same for all engines that are
driven token by token: `instance.py`. An engine with a scheduler of its own, such as vLLM, brings a connector instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hetkv.errors import InputError, PoolFullError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec

Logits = npt.NDArray[np.float32]
"""`[vocabulary]`, before any sampling."""
Ready = Callable[[int, int, int], None]
"""Called with (layer, start, stop) once the KV of these tokens of a global layer is in the pool."""


class Sequence(ABC):
    """One request in an engine. Its KV is in blocks of the engine's pool while it is sent or received."""

    blocks: list[list[int]]
    """One list for each cache group, in token order."""

    @abstractmethod
    def prefill(self, tokens: list[int], ready: Ready) -> Logits:
        """Compute a prompt; logits after its last token. When it returns, `ready` was called for every layer and token.

        The KV of what was reported as ready stays as it is until the sequence is closed.
        """

    @abstractmethod
    def adopt(self, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens has arrived in `blocks`: go on after them."""

    @abstractmethod
    def step(self, token: int) -> Logits:
        """Compute one more token; logits after it."""

    @abstractmethod
    def close(self) -> None:
        """Give its room back. Nothing reads or writes its blocks any more."""


class Engine(ABC):
    """A loaded model in some engine, and the pool that its KV is sent from and received into."""

    name: ClassVar[str]
    pool: KVPool
    fingerprint: Mapping[str, str]
    """What makes its KV: see `hetkv.integrations.fingerprint`."""
    facts: Mapping[str, Any]
    """Versions and settings, for reports."""

    @abstractmethod
    def open(self, num_tokens: int) -> Sequence:
        """Room for a sequence of up to `num_tokens` tokens. Raises `PoolFullError`."""

    def close(self) -> None:  # noqa: B027  most have nothing to end
        """Free the model. All sequences are closed."""


class Slots:
    """Which of some equal places are free: for engines that keep a sequence in one piece."""

    def __init__(self, count: int, capacity: int) -> None:
        """`count` places of `capacity` tokens each."""
        if count < 1 or capacity < 1:
            raise InputError(f"{count} sequences of {capacity} tokens: both must be at least 1")
        self.count, self.capacity = count, capacity
        self._free = list(range(count))[::-1]
        self._taken: set[int] = set()

    def take(self, num_tokens: int) -> int:
        """A place for `num_tokens` tokens. Raises `PoolFullError`."""
        if num_tokens > self.capacity:
            raise PoolFullError(f"{num_tokens} tokens: a sequence has room for {self.capacity}")
        if not self._free:
            raise PoolFullError(f"all {len(self._taken)} sequences are in use")
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """The place is free again."""
        if slot not in self._taken:
            raise InputError(f"sequence {slot} is not in use")
        self._taken.discard(slot)
        self._free.append(slot)


def check_plain(spec: KVSpec) -> None:
    """Raise `InputError` unless all layers are plain attention over all tokens, with a cache of their own."""
    for number, layer in enumerate(spec.layers):
        if layer.kind != "kv" or layer.sliding_window is not None or layer.shares is not None or layer.group:
            window = "" if layer.sliding_window is None else f" with a window of {layer.sliding_window} tokens"
            raise InputError(f"layer {number}: {layer.kind}{window} is not supported by this integration")
