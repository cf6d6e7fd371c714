"""The consumer's half of a worker: links to producers, tickets, and what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hetkv.control.payloads import MESSAGES_SINCE
from hetkv.errors import AbortedError, HetkvError, LeaseExpiredError, PeerLostError, WaitTimeoutError
from hetkv.integrations.vllm.layouts import Caches
from hetkv.integrations.vllm.metadata import Load, Metadata
from hetkv.integrations.vllm.metrics import HetKVStats
from hetkv.integrations.vllm.sending import PREEMPTED
from hetkv.transport.instance import Instance
from hetkv.transport.receiver import Receiver, RecvHandle

_log = logging.getLogger(__name__)
CONNECTS_AT_ONCE = 4
PAYLOAD_WAIT_S = 1.0
"""How long a load whose KV is there waits for the payload that was asked for: a producer may have none."""
SOON_S = 0.02
"""What a transfer takes whose prefill is done. One that takes longer waits for a prefill, or is long."""


@dataclass
class Incoming:
    """A load in flight: first its link, then its ticket."""

    load: Load
    deadline: float
    link: Future[None] | None = None
    """While the producer is being connected."""
    rx: RecvHandle | None = None
    ended: float | None = None
    """When its KV was there."""
    aborted: bool = False
    let_go: Load | None = None
    """What to ask for once this has ended: other ranks began again, and the producer would wait for this one too."""
    started: float = field(default_factory=time.monotonic)


class Results(NamedTuple):
    """Loads that ended. The failed ones are among the finished."""

    finished: set[str]
    failed: list[Load]


class Loading:
    """Incoming transfers of one rank. All but the connecting runs in the worker's thread."""

    def __init__(self, receiver: Receiver, caches: Caches, stats: HetKVStats, changed: Callable[[], None]) -> None:
        self._receiver, self._caches = receiver, caches
        self._stats, self._changed = stats, changed
        self._in: dict[str, Incoming] = {}
        self._links: dict[str, Future[None]] = {}
        self._without_payloads: set[str] = set()
        """Producers that cannot send payloads, of which the log has a line already."""
        self.repeated: set[str] = set()
        """Requests that were asked for once more. Ranks that have theirs already must release the producer for them."""
        self.payloads: dict[str, bytes] = {}
        """Of requests that asked for one."""
        self._pool = ThreadPoolExecutor(CONNECTS_AT_ONCE, "hetkv-connect")

    def begin(self, meta: Metadata) -> None:
        """Start this step's loads and end those whose requests were aborted."""
        if any(load.awaited for load in meta.loads):
            self._wait_for_device()
        for load in meta.loads:
            in_flight = self._in.get(load.request_id)
            if in_flight is not None and not load.awaited:
                in_flight.let_go = load
            else:
                self._begin(load)
        for request_id in meta.aborted_loads:
            incoming = self._in.get(request_id)
            if incoming is not None:
                incoming.aborted = True
                if incoming.rx is not None:
                    incoming.rx.abort("the consumer's request was aborted")

    def poll(self) -> Results:
        """Take what has happened since the last call."""
        results = Results(set(), [])
        for name, incoming in list(self._in.items()):
            try:
                done = self._advance(incoming)
            except HetkvError as error:
                self._fail(incoming, error, results)
                done = True
            if not done:
                continue
            del self._in[name]
            if incoming.load.awaited:
                results.finished.add(incoming.load.request_id)
            if incoming.let_go is not None:
                self._begin(incoming.let_go)
        return results

    @property
    def due(self) -> bool:
        """Whether a load was asked for a moment ago: if its prefill is done, it will end any moment."""
        since = time.monotonic() - SOON_S
        return any(incoming.started > since for incoming in self._in.values())

    def close(self) -> None:
        """Stop connecting. Loads in flight end with the receiver."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, load: Load) -> None:
        name = load.request_id if load.awaited else f"{load.request_id} (let go)"
        self._in[name] = Incoming(load, time.monotonic() + self._receiver.config.lease_s, self._link(load))

    def _wait_for_device(self) -> None:
        """Wait for vLLM's stream, which may write these blocks too: it zeroes new ones, and copies within a prefix.

        Unpacks run in a separate stream, so the host waits, and where a step runs the model, until that has ended.
        """
        device = self._receiver.device
        if device is not None and device.torch is not None:
            torch.cuda.current_stream(device.torch).synchronize()

    def _advance(self, incoming: Incoming) -> bool:
        """Whether the load has ended well. Raises its error."""
        if incoming.link is not None:
            if not incoming.link.done():
                if time.monotonic() >= incoming.deadline:
                    raise LeaseExpiredError(f"{incoming.load.source} could not be connected within the lease")
                return False
            incoming.link.result()
            incoming.link = None
            self._ask(incoming)
        rx = incoming.rx
        assert rx is not None
        if not rx.done():
            return False
        error = rx.future.exception()
        if error is None and self._awaits_payload(incoming, rx):
            return False
        if error is None:
            if incoming.load.awaited and not incoming.aborted:
                self._stats.add("loads")
                self._stats.add("loaded_tokens", incoming.load.stop - incoming.load.cached)
                self._stats.observe("load_seconds", time.monotonic() - incoming.started)
            return True
        again = isinstance(error, AbortedError) and error.reason == PREEMPTED and not incoming.aborted
        if not again or time.monotonic() >= incoming.deadline:
            raise error
        # The producer computes the request once more, and takes a new ticket for it.
        self._stats.add("repeated_loads")
        self.repeated.add(incoming.load.request_id)
        self._ask(incoming)
        return False

    def _awaits_payload(self, incoming: Incoming, rx: RecvHandle) -> bool:
        """Whether a load whose KV is there waits for its payload; takes that."""
        if rx.awaited is None or incoming.aborted:
            return False
        incoming.ended = incoming.ended or time.monotonic()
        try:
            self.payloads[incoming.load.request_id] = rx.payload(0)
        except WaitTimeoutError:
            return time.monotonic() < incoming.ended + PAYLOAD_WAIT_S
        except HetkvError as error:  # the KV is there
            _log.warning("request %s: its payload did not come: %s", incoming.load.request_id, error)
        return False

    def _ask(self, incoming: Incoming) -> None:
        """Give the ticket. One whose request was aborted meanwhile asks for nothing, so that the producer is let go."""
        load = incoming.load
        groups = len(load.blocks)
        cached = [load.stop if incoming.aborted else load.cached] * groups
        incoming.rx = self._receiver.receive(
            load.name,
            self._caches.blocks(load.blocks) if cached[0] < load.stop else [[] for _ in range(groups)],
            load.stop,
            num_cached_tokens=cached,
            src_instance=load.source,
            lease_s=max(0.001, incoming.deadline - time.monotonic()),
            content=load.content,
            payload=load.wants_payload and load.awaited and self._caches.rank == 0 and self._has_payloads(load.source),
        )
        incoming.rx.future.add_done_callback(lambda _: self._changed())

    def _has_payloads(self, source: str) -> bool:
        """Whether the producer's version has payloads: KV comes from one without them, too."""
        old = [peer for peer in self._receiver.peers if peer.instance == source and peer.minor < MESSAGES_SINCE]
        if old and source not in self._without_payloads:
            self._without_payloads.add(source)
            _log.warning("%s speaks version 2.%d, which has no payloads: requests go on without", source, old[0].minor)
        return not old

    def _fail(self, incoming: Incoming, error: HetkvError, results: Results) -> None:
        if not incoming.load.awaited:
            _log.warning("transfer %s: the producer was not let go: %s", incoming.load.name, error)
            return
        if incoming.aborted:
            return
        load = incoming.load
        _log.warning("request %s, transfer %s: %s: %s", load.request_id, load.name, type(error).__name__, error)
        self._stats.add("failed_loads")
        results.failed.append(load)

    def _link(self, load: Load) -> Future[None]:
        """Done once every rank of the producer that holds something of this rank is linked."""
        if self._is_linked(load):
            linked: Future[None] = Future()
            linked.set_result(None)
            return linked
        in_flight = self._links.get(load.source)
        if in_flight is not None and not in_flight.done():
            return in_flight
        self._links = {source: link for source, link in self._links.items() if not link.done()}
        future = self._links[load.source] = self._pool.submit(self._connect, load)
        future.add_done_callback(lambda _: self._changed())
        return future

    def _is_linked(self, load: Load) -> bool:
        """Whether every rank of the producer that holds something of this rank is linked."""
        peers = {peer.rank: peer for peer in self._receiver.peers if peer.instance == load.source}
        return bool(peers) and set(next(iter(peers.values())).agreement.ranks) <= set(peers)

    def _connect(self, load: Load) -> None:
        """Body of a connecting thread. Whatever goes wrong in it fails the loads that wait for it, not the engine."""
        try:
            self._receiver.connect(Instance(load.source, tuple(load.addresses)))
        except HetkvError:
            raise
        except Exception as error:
            _log.exception("connecting %s", load.source)
            raise PeerLostError(f"connecting {load.source}: {type(error).__name__}: {error}") from error
