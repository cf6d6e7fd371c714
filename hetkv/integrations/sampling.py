"""Choosing tokens from logits, in a way that any engine can go on with: `Sampling`, `Chosen`."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from hetkv.errors import InputError

MAX_SEED = 2**63


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen, and how many have been: an instance that goes on with it draws what the first would have.

    The random numbers are those of NumPy's Philox generator with the key `seed`, one for each token, by its number.
    """

    temperature: float = 0.0
    """0: the most probable token."""
    top_k: int = 0
    """Only the `top_k` most probable tokens; 0: all."""
    seed: int = 0
    drawn: int = 0
    """Tokens that were chosen so far."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 1e6 or self.top_k < 0 or self.drawn < 0 or not 0 <= self.seed < MAX_SEED:
            raise InputError(f"sampling with {self}: numbers from 0")

    def after(self, count: int = 1) -> Sampling:
        """The state when `count` more tokens are chosen."""
        return msgspec.structs.replace(self, drawn=self.drawn + count)


class Chosen(NamedTuple):
    """A token and its log-probability before temperature and top-k."""

    token: int
    logprob: float


def choose(logits: npt.NDArray[np.float32], sampling: Sampling) -> Chosen:
    """The next token. The lowest id where several are the most probable."""
    logprobs = log_softmax(logits)
    token = int(logits.argmax()) if sampling.temperature == 0 else _draw(logprobs, sampling)
    return Chosen(token, float(logprobs[token]))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities, in double precision."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """KL(p || q) of two vectors of log-probabilities, in nats."""
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def _draw(logprobs: npt.NDArray[np.float64], sampling: Sampling) -> int:
    scaled = logprobs / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        least = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    weights = np.exp(scaled - scaled.max())
    place = np.random.Generator(np.random.Philox(key=sampling.seed, counter=sampling.drawn)).random()
    total = weights.cumsum()
    return int(min(np.searchsorted(total, place * total[-1], side="right"), len(weights) - 1))
