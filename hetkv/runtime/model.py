"""The decoder: layers of attention and MLPs in plain PyTorch, keys and values in a paged pool.

One forward pass takes any number of `Span`s (a prompt, a chunk of one, or one token to decode from) and runs the dense
products over all their tokens at once; attention is over keys and values gathered from each sequence's pages.

A model may be split over the ranks of a `ParallelGroup`: each has its `Part`, makes the same calls with the same
arguments, and keeps its part's keys and values. Products into heads and channels are split by output; those out of
them by input, and the parts are summed (Megatron-LM, arXiv:1909.08053). Hidden states pass from pipeline stage to
pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hetkv.errors import InputError
from hetkv.kv.spec import KVSpec, Shard
from hetkv.models import ModelConfig
from hetkv.runtime.attention import Attention, AttentionLayer
from hetkv.runtime.batch import Batch, Span
from hetkv.runtime.checkpoint import read_checkpoint
from hetkv.runtime.graphs import DecodeGraphs, FixedBatch
from hetkv.runtime.mla import LatentAttention
from hetkv.runtime.mlp import Mixture, Mlp, mlp_of
from hetkv.runtime.norm import Norm
from hetkv.runtime.paged import Pages
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.part import Part, even
from hetkv.runtime.rope import Rotary, Rotation
from hetkv.runtime.tensors import rank_tensors
from hetkv.runtime.weights import load_weights

OnLayer = Callable[[int], None]
"""Called with layer `i` once its keys and values of this pass are in the pool, before its attention is computed."""

AroundLayer = Callable[[int], AbstractContextManager[object]]
"""Called with layer `i`; everything that the pass computes of that layer, and nothing else, runs inside its context."""


class Layer(NamedTuple):
    """One decoder layer. Norms that a family does not have are None."""

    attention: AttentionLayer
    mlp: Mlp | Mixture
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None


class Decoder:
    """A loaded model, or a rank's part of one. Stateless between calls: all sequence state is in `Pages`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        part: Part | None = None,
        group: ParallelGroup | None = None,
    ) -> None:
        self.part, self.group = part or Part.of(config), group or ParallelGroup()
        missing = [name for name in rank_tensors(config, self.part) if name not in weights]
        if missing:
            raise InputError(f"tensor {missing[0]!r} is missing from the weights")
        self.config = config
        self.embedding = weights.get("model.embed_tokens.weight")
        self.head = self.embedding if config.tied_embeddings else weights.get("lm_head.weight")
        self.norm = self._norm(weights, "model.norm") if self.part.last else None
        self.layers = {index: self._layer(weights, index) for index in range(*self.part.shard.layers)}
        some = next(iter(weights.values()))
        self.dtype, self.device = some.dtype, some.device
        self._rotary = Rotary(config.rope, config.head_dim, self.device)
        self._sliding_rotary = (
            self._rotary if config.sliding_rope is None else Rotary(config.sliding_rope, config.head_dim, self.device)
        )
        self._spec = config.kv_spec()
        self._graphs = DecodeGraphs() if self._records else None

    @classmethod
    def load(
        cls,
        directory: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        group: ParallelGroup | None = None,
        stages: Sequence[int] | None = None,
    ) -> Decoder:
        """Read a Hugging Face directory (config.json, safetensors). `InputError` names what is missing or wrong.

        In a `group`: this rank's part, of which it reads only its slices; `stages` are the layers of each pipeline
        stage (default: as even as can be).
        """
        config, group = read_checkpoint(directory), group or ParallelGroup()
        part = Part.of(config, group.tp, group.rank % group.tp, group.pp, group.rank // group.tp, stages)
        return cls(config, load_weights(Path(directory), config, dtype, device, part), part, group)

    @property
    def _records(self) -> bool:
        """Whether steps can be CUDA graphs: routing to experts asks the host, as messages between ranks do."""
        return self.device.type == "cuda" and self.part.tp == self.part.pp == 1 and self.config.experts is None

    def _alone(self, batch: FixedBatch) -> torch.Tensor:
        logits = self._compute(batch)
        assert logits is not None, "one rank has the whole model"
        return logits

    @property
    def kv_spec(self) -> KVSpec:
        """KV geometry, for `KVPool.allocate` and for the handshake."""
        return self._spec

    @property
    def shard(self) -> Shard:
        """The part of the KV that this rank computes: its pool must hold exactly that."""
        return self.part.shard

    def prefill(
        self,
        tokens: Sequence[int],
        start: int,
        pages: Pages,
        on_layer: OnLayer | None = None,
        around_layer: AroundLayer = nullcontext,
    ) -> torch.Tensor | None:
        """Run `tokens` (a prompt or a chunk of one) from position `start`; logits `[vocab]` after the last of them."""
        logits = self.forward([Span(pages, start, tokens)], on_layer, around_layer)
        return None if logits is None else logits[0]

    def decode_step(
        self, token: int, position: int, pages: Pages, on_layer: OnLayer | None = None
    ) -> torch.Tensor | None:
        """Run one token at `position`; logits `[vocab]` for the token after it."""
        logits = self.forward([Span(pages, position, (token,))], on_layer)
        return None if logits is None else logits[0]

    @torch.inference_mode()
    def forward(
        self, spans: Sequence[Span], on_layer: OnLayer | None = None, around_layer: AroundLayer = nullcontext
    ) -> torch.Tensor | None:
        """One pass over a ragged batch; logits `[spans, vocab]` after the last token of each span.

        Every rank of the last stage has all logits; a rank of another stage has `None`.

        `InputError`, with nothing written: a token id outside the vocabulary, a span that is empty, starts below 0,
        ends beyond the model's context or its pages, or pages of a pool with another spec.
        """
        for span in spans:
            self._check(span)
        if self._graphs is not None and on_layer is None and around_layer is nullcontext:
            logits = self._graphs.step(spans, self._alone)
            if logits is not None:
                return logits
        return self._compute(Batch(spans), on_layer, around_layer)

    def _compute(
        self, batch: Batch | FixedBatch, on_layer: OnLayer | None = None, around_layer: AroundLayer = nullcontext
    ) -> torch.Tensor | None:
        full = self._rotary.at(batch.positions, self.dtype)
        local = full if self._sliding_rotary is self._rotary else self._sliding_rotary.at(batch.positions, self.dtype)
        shape = (len(batch.ids), self.config.hidden_size)
        x = self._embed(batch.ids) if self.part.first else self.group.receive(shape, self.dtype)
        for index, layer in self.layers.items():
            turn = full if self.config.sliding_windows[index] is None else local
            with around_layer(index):
                x = self._run(index, layer, x, batch, turn, on_layer)
        if not self.part.last:
            self.group.send(x)
            return None
        return self._logits(x[batch.ends])

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[tokens, hidden]`: each rank looks up the ids that it has rows of."""
        assert self.embedding is not None
        start, stop = self.part.vocab
        mine = (ids >= start) & (ids < stop)
        rows = F.embedding(torch.where(mine, ids - start, 0), self.embedding)
        rows = self.group.sum(rows.masked_fill_(~mine[:, None], 0))
        scale = self.config.embedding_scale
        return rows if scale == 1 else rows * torch.tensor(scale, dtype=self.dtype).item()

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab]` of hidden states `[rows, hidden]`: each rank makes those of its part of the vocabulary."""
        assert self.norm is not None
        assert self.head is not None
        config, tp = self.config, self.part.tp
        logits = self.group.concat(
            F.linear(self.norm(x), self.head), [even(config.vocab_size, tp, rank).size for rank in range(tp)]
        )
        if config.logits_divisor != 1:
            logits = logits / config.logits_divisor
        cap = config.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _run(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        batch: Batch | FixedBatch,
        turn: Rotation,
        on_layer: OnLayer | None,
    ) -> torch.Tensor:
        """One layer's hidden states, its keys and values written."""
        q, k, v = layer.attention.project(_normed(layer.before_attention, x), turn)
        batch.write(index, k, v)
        if on_layer is not None:
            on_layer(index)
        out = self.group.sum(layer.attention.output(layer.attention.attend(batch, q)))
        x = self._add(x, _normed(layer.after_attention, out))
        out = self.group.sum(layer.mlp(_normed(layer.before_mlp, x)))
        return self._add(x, _normed(layer.after_mlp, out))

    def _add(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        scale = self.config.residual_scale
        return x + (out if scale == 1 else out * scale)

    def _layer(self, weights: Mapping[str, torch.Tensor], index: int) -> Layer:
        config = self.config
        attention: AttentionLayer
        if config.latent is not None:
            attention = LatentAttention(config, config.latent, weights, index)
        else:
            attention = Attention(config, weights, index, self.part, self.group)
        norms = [None if name is None else self._norm(weights, f"model.layers.{index}.{name}") for name in config.norms]
        return Layer(attention, mlp_of(config, weights, index), *norms)

    def _norm(self, weights: Mapping[str, torch.Tensor], name: str) -> Norm:
        return Norm(weights[f"{name}.weight"], self.config.norm_eps, self.config.unit_offset)

    def _check(self, span: Span) -> None:
        if not span.tokens or span.start < 0:
            raise InputError(f"a span of {len(span.tokens)} tokens from position {span.start}")
        if span.stop > self.config.max_context:
            raise InputError(
                f"position {span.stop - 1} is beyond the model's context of {self.config.max_context} tokens"
            )
        if span.stop > span.pages.capacity:
            raise InputError(
                f"position {span.stop - 1} is beyond the {span.pages.capacity} tokens that the sequence's blocks hold"
            )
        if span.pages.pool.spec != self._spec:
            raise InputError("the pool was made for another model: its KV spec differs from the checkpoint's")
        if span.pages.pool.shard != self.part.shard:
            raise InputError("the pool was made for another rank: its layers and heads are not those computed here")
        low, high = min(span.tokens), max(span.tokens)
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise InputError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")


def _normed(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
