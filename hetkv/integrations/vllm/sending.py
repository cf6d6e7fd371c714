"""The producer's half of a worker: layers leave as they are computed, or once the request is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hetkv.errors import AbortedError, HetkvError, WaitTimeoutError
from hetkv.integrations.vllm.layouts import Caches
from hetkv.integrations.vllm.metadata import Metadata, Send
from hetkv.integrations.vllm.metrics import HetKVStats
from hetkv.transport.batch import SendBatch
from hetkv.transport.sender import Sender, SendHandle

_log = logging.getLogger(__name__)
PREEMPTED = "preempted, will be computed again"
"""Why a transfer ends whose request will be computed and sent again under the same transfer id."""
OVER = "the producer has sent the request, or given it up: its blocks are free"
"""The answer to a consumer that asks for a request after that."""
DRAIN_S = 60.0
NO_LIMIT_S = 1e6


@dataclass
class Outgoing:
    """A request in flight. `tx` is `None` where it could not be started."""

    tx: SendHandle | None
    blocks: list[int] = field(default_factory=list)
    """Per cache group: blocks that `tx` knows."""
    sent: int = 0
    """Tokens whose layers were handed to `tx`."""
    held_since: float | None = None
    """The scheduler holds the blocks since then, and waits for the report that they are free."""
    computed_at: float = 0.0
    """When its prefill was done."""
    ended_at: float | None = None
    """When `tx` ended: nothing reads the request's blocks any more."""

    @property
    def live(self) -> SendHandle | None:
        """`tx`, where it may still take layers. One that its consumers let go or gave up knows no later blocks."""
        return None if self.tx is None or self.tx.is_packed else self.tx

    def end(self, _: object) -> None:
        """Callback of `tx.future`."""
        self.ended_at = time.monotonic()


class Sending:
    """Outgoing transfers of one rank, by vLLM's request id. All but `changed` runs in the worker's thread."""

    def __init__(
        self,
        sender: Sender,
        caches: Caches,
        stats: HetKVStats,
        changed: Callable[[], None],
        on_all_ranks: Callable[[list[bool]], list[bool]],
    ) -> None:
        """`on_all_ranks`: which of these statements hold on every rank of this instance; all of them ask at once."""
        self._sender, self._caches = sender, caches
        self._stats, self._changed, self._on_all_ranks = stats, changed, on_all_ranks
        self._out: dict[str, Outgoing] = {}
        self._batch: SendBatch | None = None
        """What the running step computes of all requests."""
        self._layers_left: set[int] = set()
        self._computed_at = time.monotonic()

    def preempt(self, meta: Metadata) -> None:
        """End the transfers of requests whose blocks are about to be overwritten; wait until nothing reads them.

        A request that was sent in full stays, as its blocks are not read again. But a consumer rank that lost one
        rank's part asks every rank once more, so the request stays on all ranks or on none; consumer ranks that lost
        nothing let the new transfers go (`Loading.repeated`). A consumer does not ask again for what it gave up: that
        stays ended.
        """
        if not meta.preempted:
            return
        names = sorted(meta.preempted)
        sent = self._everywhere(names, lambda name: self._all_left(name) or self._end(name))
        again = [name for name, all_sent in zip(names, sent, strict=True) if not all_sent]
        if again:
            self._everywhere(again, self._end)
        for name in again:
            if name in self._out and not self._given_up(name):
                del self._out[name]

    def begin_step(self, meta: Metadata) -> None:
        """Prepare the requests whose layers leave during this step, and send those that are done."""
        step = []
        for send in meta.computing:
            out = self._out.get(send.request_id) or self._open(send)
            self._extend(out, send)
            if (tx := out.live) is not None and out.sent < send.stop:
                step.append((tx, (out.sent, send.stop)))
                out.sent = send.stop
        self._batch = self._sender.batch(step) if step else None
        self._layers_left = set(self._caches.pool.layers) if step else set()
        for send in meta.held:
            self._hold(send)
        for request_id in meta.dropped:
            self._out.setdefault(request_id, Outgoing(None)).held_since = time.monotonic()
            self._abort(self._out[request_id], "the request ended before its prefill was done")
        for name in meta.rejected:
            self._sender.reject(name, OVER)

    def send_layer(self, name: str) -> None:
        """A layer of this step is computed."""
        layer = self._caches.index_of.get(name)
        if layer in self._layers_left:
            self._layers_left.discard(layer)
            self._send(layer)

    def end_step(self) -> None:
        """Send the layers whose hook did not run, as under a full CUDA graph."""
        for layer in sorted(self._layers_left):
            self._send(layer)
        self._layers_left = set()
        self._batch = None
        self._computed_at = time.monotonic()

    def poll(self, finished: set[str]) -> set[str]:
        """Requests whose blocks the scheduler may free now. `finished`: requests that it ended."""
        now = time.monotonic()
        free = set()
        for request_id, out in list(self._out.items()):
            if out.held_since is None:
                if request_id in finished:
                    self._abort(out, "the request ended")
                    del self._out[request_id]
                continue
            if out.tx is None or out.ended_at is not None:
                free.add(request_id)
                del self._out[request_id]
                self._count(out)
                if out.tx is not None:
                    self._sender.reject(out.tx.request_id, OVER)
            elif now - out.held_since > self._sender.config.hold_s:
                self._abort(out, "no consumer took the request within hold_s")
                self._stats.add("expired_sends")
                out.held_since = now + NO_LIMIT_S  # once
        return free

    def _open(self, send: Send) -> Outgoing:
        blocks = self._caches.blocks(send.blocks)
        try:
            tx = self._sender.send(
                send.name,
                blocks,
                send.num_tokens,
                hold_s=NO_LIMIT_S,
                content=send.content,
                priority=send.priority,
            )
        except HetkvError as error:
            _log.error("request %s: %s", send.request_id, error)
            self._stats.add("failed_sends")
            tx = None
        out = self._out[send.request_id] = Outgoing(tx, [len(ids) for ids in blocks])
        if tx is not None:
            if send.payload is not None:  # the request's own limit is none: a prefill, then `hold_s`
                tx.carry(send.payload, keep_s=min(2 * self._sender.config.hold_s, NO_LIMIT_S))
            tx.future.add_done_callback(out.end)
            tx.future.add_done_callback(lambda _: self._changed())
        return out

    def _extend(self, out: Outgoing, send: Send) -> None:
        for group, ids in enumerate(self._caches.blocks(send.blocks)):
            more = ids[out.blocks[group] :]
            if more and (tx := out.live) is not None:
                tx.extend(more, group)
                out.blocks[group] = len(ids)

    def _hold(self, send: Send) -> None:
        """The prefill is done. What has not left yet leaves when its ticket comes."""
        out = self._out.get(send.request_id) or self._open(send)
        out.held_since, out.computed_at = time.monotonic(), self._computed_at
        if (tx := out.live) is not None and out.sent < send.stop:
            self._sender.batch([(tx, (out.sent, send.stop))]).send_layers()
            out.sent = send.stop

    def _all_left(self, request_id: str) -> bool:
        """Whether no block of the request is read again."""
        out = self._out.get(request_id)
        return out is None or out.tx is None or (out.tx.is_packed and out.tx.error is None)

    def _end(self, request_id: str) -> bool:
        """Abort a transfer and wait for its end: only then can its id be sent again.

        Returns whether it had ended before: in success, or given up by its consumer. Raises `WaitTimeoutError`.
        """
        out = self._out.get(request_id)
        if out is None or out.tx is None:
            return True
        out.tx.abort(PREEMPTED)
        try:
            out.tx.wait(DRAIN_S)
        except WaitTimeoutError:
            raise
        except HetkvError:
            return self._given_up(request_id)
        return True

    def _given_up(self, request_id: str) -> bool:
        """Whether an ended transfer failed by something other than `preempt`."""
        tx = self._out[request_id].tx
        error = tx.future.exception() if tx is not None else None
        return error is not None and not (isinstance(error, AbortedError) and error.reason == PREEMPTED)

    def _everywhere(self, names: list[str], ask: Callable[[str], bool]) -> list[bool]:
        """What is true of these requests on all ranks. Where one rank runs out of time all raise `WaitTimeoutError`.

        To go on would send what another request overwrites; a rank that left alone would let the others wait for it.
        """
        answers, in_time = [], True
        for name in names:
            try:
                answers.append(ask(name))
            except WaitTimeoutError:
                answers.append(False)
                in_time = False
        in_time, *answers = self._on_all_ranks([in_time, *answers])
        if not in_time:
            raise WaitTimeoutError(f"the blocks of preempted requests {names} are still read after {DRAIN_S:g} s")
        return answers

    def _send(self, layer: int) -> None:
        """One call for all requests of the step. On a device the layer leaves after the work in PyTorch's current
        stream, where vLLM has just computed it."""
        if self._batch is not None:
            self._batch.send_layer(layer)

    def _abort(self, out: Outgoing, why: str) -> None:
        if out.tx is not None:
            out.tx.abort(why)

    def _count(self, out: Outgoing) -> None:
        """Add a transfer that has ended to the statistics."""
        if out.tx is None or out.ended_at is None:
            return
        error = out.tx.future.exception()
        if error is None:
            self._stats.add("sends")
            self._stats.observe("exposed_seconds", max(0.0, out.ended_at - out.computed_at))
        else:
            self._stats.add("failed_sends")
            _log.warning("transfer %s: %s", out.tx.request_id, error)
