"""An `Engine` as a prefill and a decode instance: links, requests, what crosses besides KV. Alike for all engines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec
import numpy as np

from hetkv.control.secret import SecretFile
from hetkv.control.tls import TlsConfig
from hetkv.integrations.engine import Engine, Logits, Sequence
from hetkv.integrations.first_token import FirstToken
from hetkv.integrations.names import wire_name
from hetkv.integrations.sampling import Chosen, Sampling, choose, log_softmax
from hetkv.transport.config import TransferConfig
from hetkv.transport.content import content_digest
from hetkv.transport.exchange import Exchange
from hetkv.transport.instance import Instance as Book
from hetkv.transport.receiver import RecvHandle
from hetkv.transport.sender import SendHandle

WAIT_S = 600.0


class Generated(msgspec.Struct, kw_only=True):
    """Tokens that an instance chose, and when (CLOCK_MONOTONIC, ns)."""

    tokens: list[int]
    logprobs: list[float]
    start_ns: int
    first_ns: int
    """The first token was chosen."""
    stop_ns: int
    distributions: list[list[float] | None] = []
    """Log-probabilities of the whole vocabulary for the first tokens, where they were asked for; null for a token that
    another instance chose."""


class Incoming(NamedTuple):
    """A request whose ticket is given."""

    sequence: Sequence
    handle: RecvHandle
    tokens: list[int]


class EngineInstance:
    """One engine of one rank, able to prefill for other instances and to decode for them. One thread at a time."""

    def __init__(
        self,
        engine: Engine,
        *,
        instance: str,
        secret: bytes | SecretFile | None = None,
        config: TransferConfig | None = None,
        tls: TlsConfig | None = None,
    ) -> None:
        """Opens both nodes over the engine's pool. Raises what `Sender` does."""
        self.engine, self.instance = engine, instance
        with ExitStack() as stack:
            stack.callback(engine.close)
            self.nodes = stack.enter_context(
                Exchange(
                    engine.pool,
                    instance=instance,
                    secret=secret,
                    config=config,
                    tls=tls,
                    fingerprint=dict(engine.fingerprint),
                )
            )
            self._stack = stack.pop_all()
        self._sending: dict[str, tuple[SendHandle, Sequence]] = {}
        self._incoming: dict[str, Incoming] = {}

    def close(self) -> None:
        """End all requests and links, and the engine."""
        self._stack.close()

    def listen(self, address: str = "127.0.0.1:0") -> str:
        """Take decode instances; returns the address for their `connect`."""
        return self.nodes.sender.listen(address)

    def connect(self, source: str, addresses: list[str]) -> None:
        """Link to the prefill instance `source`. Raises `IncompatibleError` where the models differ."""
        self.nodes.receiver.connect(Book(source, tuple(addresses)))

    def prefill(self, request_id: str, tokens: list[int], sampling: Sampling | None = None) -> Generated:
        """Compute a prompt and choose its first token; the KV leaves as it is computed, and then what goes on with it:
        the token, its log-probability and the state of the sampling. `finish` waits for the end."""
        start, sampling = time.monotonic_ns(), sampling or Sampling()
        sequence = self.engine.open(len(tokens))
        try:
            handle = self.nodes.sender.send(
                wire_name(request_id), sequence.blocks, len(tokens), content=content_digest(tokens)
            )
        except BaseException:
            sequence.close()
            raise
        self._sending[request_id] = handle, sequence
        try:
            first = choose(
                sequence.prefill(tokens, lambda layer, start, stop: handle.send_layer(layer, (start, stop))),
                sampling,
            )
            handle.carry(FirstToken(token=first.token, logprob=first.logprob, sampling=sampling.after()).encode())
        except BaseException:
            handle.abort("the prefill failed")
            raise
        now = time.monotonic_ns()
        return Generated(tokens=[first.token], logprobs=[first.logprob], start_ns=start, first_ns=now, stop_ns=now)

    def finish(self, request_id: str, timeout: float = WAIT_S) -> None:
        """Wait until a prefilled request has been received, and give its room back. Raises what ended it."""
        handle, sequence = self._sending.pop(request_id)
        try:
            handle.wait(timeout)
        finally:
            sequence.close()

    def accept(self, request_id: str, source: str, tokens: list[int], max_new_tokens: int) -> None:
        """Make room for a prompt that instance `source` computes, and give its ticket; returns at once."""
        sequence = self.engine.open(len(tokens) + max_new_tokens)
        try:
            handle = self.nodes.receiver.receive(
                wire_name(request_id),
                sequence.blocks,
                len(tokens),
                src_instance=source,
                content=content_digest(tokens),
                payload=True,
            )
        except BaseException:
            sequence.close()
            raise
        self._incoming[request_id] = Incoming(sequence, handle, tokens)

    def decode(
        self,
        request_id: str,
        max_new_tokens: int,
        distributions: int = 0,
        timeout: float = WAIT_S,
    ) -> Generated:
        """Go on with an accepted request once its KV is there, after the first token that the prefill instance chose,
        with its sampling. Raises what ended the request."""
        sequence, handle, tokens = self._incoming.pop(request_id)
        start = time.monotonic_ns()
        try:
            handle.wait(timeout)
            sequence.adopt(len(tokens))
            first = FirstToken.decode(handle.payload(timeout))
            return self._go_on(sequence, first.chosen, max_new_tokens, first.sampling, start, distributions)
        finally:
            sequence.close()

    def generate(
        self, tokens: list[int], max_new_tokens: int, sampling: Sampling | None = None, distributions: int = 0
    ) -> Generated:
        """The same without a transfer: what this engine alone says."""
        start = time.monotonic_ns()
        sampling = sampling or Sampling()
        sequence = self.engine.open(len(tokens) + max_new_tokens)
        try:
            logits = sequence.prefill(tokens, lambda *_: None)
            made = self._go_on(
                sequence, choose(logits, sampling), max_new_tokens, sampling.after(), start, distributions, logits
            )
        finally:
            sequence.close()
        return made

    def facts(self) -> dict[str, Any]:
        """Versions and settings of the engine, its fingerprint and its pool."""
        return {**self.engine.facts, "fingerprint": dict(self.engine.fingerprint), "pool": repr(self.engine.pool)}

    def stats(self) -> Mapping[str, Any]:
        """Counters of both nodes."""
        return {"sender": self.nodes.sender.stats(), "receiver": self.nodes.receiver.stats()}

    def _go_on(
        self,
        sequence: Sequence,
        first: Chosen,
        count: int,
        sampling: Sampling,
        start_ns: int,
        distributions: int,
        logits: Logits | None = None,
    ) -> Generated:
        """`count` tokens in all, those after `first` by `sampling`. `distributions`: of how many of them the
        log-probabilities are kept; `logits`: those that `first` was chosen from, where this engine made them."""
        chosen, kept = [first], [None if logits is None else _logprobs(logits)]
        first_ns = time.monotonic_ns()
        while len(chosen) < count:
            logits = sequence.step(chosen[-1].token)
            if len(kept) < distributions:
                kept.append(_logprobs(logits))
            chosen.append(choose(logits, sampling))
            sampling = sampling.after()
        return Generated(
            tokens=[at.token for at in chosen],
            logprobs=[at.logprob for at in chosen],
            start_ns=start_ns,
            first_ns=first_ns,
            stop_ns=time.monotonic_ns(),
            distributions=kept[:distributions],
        )


def _logprobs(logits: Logits) -> list[float]:
    return list(log_softmax(np.asarray(logits)).tolist())
