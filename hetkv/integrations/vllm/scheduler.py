"""The scheduler's side: which requests are sent or loaded, which blocks are kept, and what the router gets."""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.request import RequestStatus

from hetkv.errors import InputError
from hetkv.integrations.vllm.content import content_of
from hetkv.integrations.vllm.metadata import Blocks, Load, Metadata, Reported, Send, WorkerAddress
from hetkv.integrations.vllm.naming import Claims, Sequence, TransferIds
from hetkv.integrations.vllm.params import Consume, consume, produce

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)
IDLE_SHARE, MAX_IDLE_S, MAX_HELD_S = 1 / 16, 0.005, 0.02
"""An engine that only waits sleeps this share of the time it has waited, so that it leaves the processor to others and
learns of the end at most that much later. It never sleeps longer than the second value while it waits for KV, and than
the third one while blocks are held, as a new request may come."""


@dataclass
class Producing:
    """A request that this producer computes for a consumer."""

    request: Request
    transfer_id: str
    """What the router knows it by."""
    name: str
    """Of the sequence on the wire: `Sequence.name`."""
    content: bytes
    concurrent: bool
    kept: bool
    """Its KV is sent. Not where another choice of the same prompt serves for all."""
    payload: bytes | None = None
    """What crosses with it."""
    sent: int = 0
    """Mode `concurrent`: tokens whose layers the workers were asked to send."""

    def send(self, stop: int, blocks: Blocks) -> Send:
        """Its tokens `[0, stop)`. vLLM's priority is any integer of a client's."""
        priority = max(-(2**31), min(self.request.priority, 2**31 - 1))
        prompt = self.request.num_prompt_tokens
        payload = None if self.sent else self.payload  # workers keep it with the transfer, which begins here
        return Send(self.request.request_id, self.name, self.content, prompt, stop, _copy(blocks), priority, payload)


class SchedulerSide:
    """All of it runs in the scheduler's thread. Nothing here talks to a peer, and nothing a client sends may raise."""

    def __init__(
        self,
        engine_id: str,
        cache_config: KVCacheConfig,
        producer: bool,
        consumer: bool,
        *,
        paced: bool = True,
        prefix_caching: bool = False,
    ) -> None:
        """`paced`: an engine that only waits may sleep. Not where others step with it, as in data parallelism."""
        self._engine_id, self._paced = engine_id, paced
        self._cache_config = cache_config
        self._producer, self._consumer = producer, consumer
        self._addresses: tuple[str, ...] = ()
        self._next = Metadata()
        self._transfer_ids = TransferIds()
        self._sends, self._loads = Claims(), Claims()
        self._producing: dict[str, Producing] = {}
        self._held: set[str] = set()
        self._loading: dict[str, Load] = {}
        self._payloads: dict[str, bytes] = {}
        """Of consumer's requests that are not finished."""
        self._prefix_caching = prefix_caching
        self._cached: dict[str, int] = {}
        """Consumer's requests: tokens that its own prefix cache had, between two calls of the scheduler."""
        self._settled: set[str] = set()
        """Consumer's requests whose `do_remote_prefill` has been seen to."""
        self._idle_since: float | None = None
        specs = [
            inner
            for group in cache_config.transfer_groups
            for inner in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
        ]
        assert not any(isinstance(spec, UniformTypeKVCacheSpecs) for spec in specs)
        self._sliding_windows = any(isinstance(spec, SlidingWindowSpec) for spec in specs)

    def set_addresses(self, workers: Mapping[int, WorkerAddress]) -> None:
        """Where the workers listen, by rank."""
        self._addresses = tuple(workers[rank].address for rank in sorted(workers)) if self._producer else ()

    def on_new_request(self, request: Request) -> None:
        """Note a request that is computed for a consumer."""
        if request.request_id in self._producing:
            return
        try:
            wanted = produce(request.kv_transfer_params)
        except InputError as error:
            _log.warning("request %s: %s; its KV will not be kept", request.request_id, error)
            return
        if wanted is None or wanted.describe:
            return
        if not self._producer:
            _log.warning("request %s: do_remote_decode, but this instance is not a producer", request.request_id)
            return
        sequence = Sequence.of(request.request_id)
        transfer_id = wanted.transfer_id or self._transfer_ids.of(sequence)
        name = sequence.name(transfer_id)
        kept = not self._sends.taken(name, sequence)
        content, concurrent = content_of(request), wanted.rendezvous == "concurrent"
        self._producing[request.request_id] = Producing(
            request, transfer_id, name, content, concurrent, kept, wanted.data()
        )
        if kept:
            self._sends.take(name, sequence)
            if self._sliding_windows:
                drop_last_token(request)

    def num_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that the producer has and this consumer lacks: all but the prompt's last, which is always computed.

        `None` where that is not known yet: a further choice of a prompt waits for the first one's KV, to find it in the
        prefix cache. Without such a cache it computes the prompt.
        """
        remote = self._remote(request)
        if remote is None:
            return 0, False
        sequence = Sequence.of(request.request_id)
        name = sequence.name(remote.transfer_id)
        taken = self._loads.taken(name, sequence)
        if self._is_loading(name):
            waits = taken and self._prefix_caching and not request.skip_reading_prefix_cache
            return (None if waits else 0), False
        if taken:
            return 0, False
        count = last_token(request) - num_computed_tokens
        if count <= 0:
            return 0, False
        self._cached[request.request_id] = num_computed_tokens
        return count, True

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Ask for the tokens that blocks were allocated for; where there are none, let the producer go."""
        remote = self._remote(request)
        if remote is None:
            return
        self._settled.add(request.request_id)
        cached = self._cached.pop(request.request_id, None)
        if num_external_tokens == 0 or cached is None:
            self._let_go(request, remote)
            return
        sequence = Sequence.of(request.request_id)
        self._loads.take(sequence.name(remote.transfer_id), sequence)
        ids = self._cache_config.select_transfer_block_ids(blocks.get_block_ids())
        load = self._loading[request.request_id] = _load(request, remote, cached, cached + num_external_tokens, ids)
        self._next.loads.append(load)

    def build_meta(self, output: SchedulerOutput) -> Metadata:
        """This step's orders."""
        meta, self._next = self._next, Metadata()
        meta.computes = output.total_num_scheduled_tokens > 0
        for request_id in output.preempted_req_ids or ():
            producing = self._producing.get(request_id)
            if producing is not None and producing.sent:
                producing.sent = 0
                meta.preempted.add(request_id)
            elif request_id in meta.dropped:  # its blocks were taken away before it ended
                meta.preempted.add(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            producing = self._producing.get(request_id)
            if producing is None or not producing.concurrent or not producing.kept:
                continue
            prompt = producing.request.num_prompt_tokens
            stop = min(producing.request.num_computed_tokens + count, prompt)
            if stop <= producing.sent:
                continue
            assert output.kv_connector_block_state is not None
            blocks = output.kv_connector_block_state.get_block_ids(request_id)
            assert blocks is not None
            meta.computing.append(producing.send(stop, self._cache_config.select_transfer_block_ids(blocks)))
            producing.sent = stop
        self._pace(meta)
        return meta

    def finished(self, request: Request, block_ids: Blocks) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must stay, and what the router gets."""
        self._forget_load(request)
        payload = self._payloads.pop(request.request_id, None)
        if self._asks_who(request):
            return False, self._answer(None)
        producing = self._producing.pop(request.request_id, None)
        if producing is None:
            return False, None if payload is None else {"payload": base64.b64encode(payload).decode()}
        computed = min(request.num_computed_tokens, request.num_prompt_tokens)
        done = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if done and computed == request.num_prompt_tokens:
            answer = self._answer(producing.transfer_id)
            if producing.kept:
                ids = self._cache_config.select_transfer_block_ids(block_ids)
                self._next.held.append(producing.send(computed, ids))
                self._held.add(request.request_id)
            return producing.kept, answer
        if producing.sent:
            self._next.dropped.add(request.request_id)
            self._held.add(request.request_id)
            return True, None
        if producing.concurrent and producing.kept:
            self._next.rejected.append(producing.name)
        return False, None

    def on_output(self, output: KVConnectorOutput) -> None:
        """Take what the workers have finished."""
        if output.finished_sending or output.finished_recving:
            self._idle_since = None
        self._held.difference_update(output.finished_sending or ())
        if isinstance(reported := output.kv_connector_worker_meta, Reported):
            # Each rank lets the producer go once it is done: for one that had its part already nothing is new.
            self._next.loads += [self._loading[name].let_go for name in reported.repeated if name in self._loading]
            self._payloads.update((name, data) for name, data in reported.payloads.items() if self._wants_payload(name))
        for request_id in output.finished_recving or ():
            self._loading.pop(request_id, None)

    @property
    def pending(self) -> bool:
        """Whether the engine must keep stepping though it has nothing to compute."""
        return bool(self._next.any_orders or self._held or self._loading)

    def _pace(self, meta: Metadata) -> None:
        """vLLM steps on without a pause while anything is pending: see `IDLE_SHARE`."""
        if not self._paced or meta.computes or meta.any_orders:
            self._idle_since = None
            return
        now = time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        longest = MAX_IDLE_S if self._loading else MAX_HELD_S
        time.sleep(min(longest, IDLE_SHARE * (now - self._idle_since)))

    def _remote(self, request: Request) -> Consume | None:
        """What the request asks for and has not got an answer to."""
        if request.request_id in self._settled:
            return None
        try:
            remote = consume(request.kv_transfer_params)
        except InputError as error:
            remote = None
            _log.warning("request %s: %s; its prompt is computed here", request.request_id, error)
        if remote is not None and not self._consumer:
            _log.warning("request %s: do_remote_prefill, but this instance is not a consumer", request.request_id)
            remote = None
        if remote is None:
            self._settled.add(request.request_id)
        return remote

    def _wants_payload(self, request_id: str) -> bool:
        load = self._loading.get(request_id)
        return load is not None and load.wants_payload

    def _is_loading(self, name: str) -> bool:
        return any(load.name == name for load in self._loading.values())

    def _let_go(self, request: Request, remote: Consume) -> None:
        """The producer may have its blocks back: this consumer needs nothing of them. Said once for all choices."""
        sequence = Sequence.of(request.request_id)
        name = sequence.name(remote.transfer_id)
        if self._loads.taken(name, sequence) or self._is_loading(name):
            return
        self._loads.take(name, sequence)
        stop = max(1, last_token(request))
        empty: Blocks = tuple([] for _ in self._cache_config.transfer_groups)
        self._next.loads.append(_load(request, remote, stop, stop, empty))

    def _forget_load(self, request: Request) -> None:
        """The request ended before it was scheduled, or while its KV is loaded."""
        if request.request_id in self._loading:
            self._next.aborted_loads.add(request.request_id)
            self._loading[request.request_id] = self._loading[request.request_id].let_go  # nobody takes a payload
        remote = self._remote(request)
        if remote is not None:
            self._let_go(request, remote)
        self._cached.pop(request.request_id, None)
        self._settled.discard(request.request_id)

    def _asks_who(self, request: Request) -> bool:
        try:
            wanted = produce(request.kv_transfer_params)
        except InputError:
            return False
        return wanted is not None and wanted.describe and self._producer

    def _answer(self, transfer_id: str | None) -> dict[str, Any]:
        """`kv_transfer_params` of a producer's response, as a consumer takes them."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_engine_id": self._engine_id,
            "remote_addresses": list(self._addresses),
        }


def last_token(request: Request) -> int:
    """Where the load stops: before the prompt's last token."""
    return int(request.num_prompt_tokens) - 1


def drop_last_token(request: Request) -> None:
    """Let the producer compute one token less.

    vLLM frees the blocks of a sliding window that the *next* token does not see. The consumer computes the prompt's
    last token itself, and that one sees a token further back; so it must be the producer's next token.
    """
    if request.num_prompt_tokens < 2:
        return
    if request.prompt_token_ids is not None:
        del request.prompt_token_ids[-1:]
    elif request.prompt_embeds is not None:
        request.prompt_embeds = request.prompt_embeds[:-1]
    del request._all_token_ids[-1:]
    request.num_prompt_tokens -= 1
    request.max_tokens = 1


def _load(request: Request, remote: Consume, cached: int, stop: int, blocks: Blocks) -> Load:
    return Load(
        request.request_id,
        Sequence.of(request.request_id).name(remote.transfer_id),
        content_of(request),
        remote.remote_engine_id,
        remote.remote_addresses,
        cached,
        stop,
        _copy(blocks),
        remote.wants_payload,
    )


def _copy(blocks: Blocks) -> Blocks:
    """The scheduler goes on changing its lists."""
    return tuple(list(ids) for ids in blocks)
