"""How a sequence's next token is chosen: `Sampling`, and `sample` for a whole step.

The draw for a token depends on the seed and the token's place in the answer alone, so that a sequence which is computed
again, here or on another instance, continues as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import msgspec
import torch

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: logits divided by them would overflow."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen and when the answer ends."""

    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    """Of the likeliest tokens; 0: of all."""
    top_p: float = 1.0
    seed: int = 0
    logprobs: int = -1
    """Likeliest tokens to report with each chosen one; -1: nothing is reported."""
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """The likeliest token, always."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1


class Token(msgspec.Struct, frozen=True, array_like=True):
    """A chosen token. Logarithms are natural, of the model's own distribution, before temperature and cuts."""

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Draw(msgspec.Struct, frozen=True, array_like=True):
    """What `sample` needs of one sequence: token `place` of its answer, counted from 0."""

    sampling: Sampling
    place: int


def uniform(seed: int, place: int) -> float:
    """A number in [0, 1), the same in every process for a seed and a place."""
    digest = blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Token]:
    """One token for each row of logits `[sequences, vocabulary]`."""
    chosen: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [row for row, draw in enumerate(draws) if not draw.sampling.greedy]
    if drawn:
        for row, token in zip(drawn, _draw(logits[drawn], [draws[row] for row in drawn]).tolist(), strict=True):
            chosen[row] = token
    asked = [row for row, draw in enumerate(draws) if draw.sampling.logprobs >= 0]
    tokens = [Token(token) for token in chosen]
    if asked:
        most = max(draws[row].sampling.logprobs for row in asked)
        logs = logits[asked].float().log_softmax(dim=-1)
        best = logs.topk(max(most, 1), dim=-1)
        own = logs.gather(1, torch.tensor([[chosen[row]] for row in asked], device=logs.device))[:, 0].tolist()
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for row, log, (ids, values) in zip(asked, own, pairs, strict=True):
            count = draws[row].sampling.logprobs
            tokens[row] = Token(chosen[row], log, tuple(zip(ids[:count], values[:count], strict=True)))
    return tokens


def _draw(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The token at which the cumulative probability, likeliest first, passes a uniform number.

    Temperature first, then the `top_k` likeliest, then the fewest of these that hold `top_p`, as vLLM does.
    """

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    settings = [draw.sampling for draw in draws]
    values, order = (logits.float() / column([s.temperature for s in settings])).sort(dim=-1, descending=True)
    ranks = torch.arange(values.shape[-1], device=values.device)
    kept = column([float(s.top_k or values.shape[-1]) for s in settings])
    probabilities = values.masked_fill(ranks >= kept, float("-inf")).softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill((before >= column([s.top_p for s in settings])) & (ranks > 0), 0.0)
    total = probabilities.cumsum(dim=-1)
    point = column([uniform(draw.sampling.seed, draw.place) for draw in draws]) * total[:, -1:]
    place = torch.searchsorted(total, point, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not pass the end
    return order.gather(1, torch.minimum(place, last))[:, 0]
