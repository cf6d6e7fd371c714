"""The scheduler's side: which requests are sent or loaded, which blocks are held, and what the router is told."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import SlidingWindowSpec, UniformTypeKVCacheSpecs
from vllm.v1.request import RequestStatus

from hetkv.errors import InputError
from hetkv.integrations.vllm.metadata import Blocks, Load, Metadata, Repeated, Send, WorkerAddress
from hetkv.integrations.vllm.params import Consume, consume, produce

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)
IDLE_SHARE, MAX_IDLE_S = 1 / 16, 0.005
"""An engine that only waits sleeps this share of the time it has waited, so that it leaves the processor to others and
is told of the end at most that much later; and never longer than the second, in which a new request may come."""
LOCAL = "_hetkv_local_tokens"
"""Where a request keeps how many tokens the consumer's own prefix cache had, between two calls of the scheduler."""


@dataclass
class Producing:
    """A request that this producer computes for a consumer."""

    request: Request
    transfer_id: str
    concurrent: bool
    sent: int = 0
    """Mode `concurrent`: tokens whose layers the workers were told to send."""


class SchedulerSide:
    """All of it runs in the scheduler's thread. Nothing here talks to a peer, and nothing a client sends may raise."""

    def __init__(
        self, engine_id: str, cache_config: KVCacheConfig, producer: bool, consumer: bool, *, paced: bool = True
    ) -> None:
        """`paced`: an engine that only waits may sleep. Not where others step with it, as in data parallelism."""
        self._engine_id, self._paced = engine_id, paced
        self._cache_config = cache_config
        self._producer, self._consumer = producer, consumer
        self._addresses: tuple[str, ...] = ()
        self._next = Metadata()
        self._producing: dict[str, Producing] = {}
        self._held: set[str] = set()
        self._loading: dict[str, Load] = {}
        self._idle_since: float | None = None
        specs = [
            inner
            for group in cache_config.transfer_groups
            for inner in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
        ]
        assert not any(isinstance(spec, UniformTypeKVCacheSpecs) for spec in specs)
        self._windows = any(isinstance(spec, SlidingWindowSpec) for spec in specs)

    def set_addresses(self, workers: Mapping[int, WorkerAddress]) -> None:
        """Where the workers listen, by rank."""
        self._addresses = tuple(workers[rank].address for rank in sorted(workers)) if self._producer else ()

    def on_new_request(self, request: Request) -> None:
        """Note a request that is computed for a consumer."""
        try:
            wanted = produce(request.kv_transfer_params)
        except InputError as error:
            _log.warning("request %s: %s; its KV will not be kept", request.request_id, error)
            return
        if wanted is None or wanted.describe:
            return
        if not self._producer:
            _log.warning("request %s: do_remote_decode, but this instance is no producer", request.request_id)
            return
        if self._windows:
            drop_last_token(request)
        transfer_id = wanted.transfer_id or uuid.uuid4().hex
        self._producing[request.request_id] = Producing(request, transfer_id, wanted.rendezvous == "concurrent")

    def num_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that the producer has and this consumer lacks: all but the prompt's last, which is always computed."""
        remote = self._remote(request)
        if remote is None or self._loads(remote):
            return 0, False  # a second choice of the same prompt computes it, or finds it in the prefix cache
        count = last_token(request, remote) - num_computed_tokens
        if count <= 0:
            return 0, False
        assert request.kv_transfer_params is not None
        request.kv_transfer_params[LOCAL] = num_computed_tokens
        return count, True

    def after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Ask for the tokens that blocks were allocated for; where there are none, let the producer go."""
        remote = self._remote(request)
        if remote is None:
            return
        assert request.kv_transfer_params is not None
        request.kv_transfer_params["do_remote_prefill"] = False
        cached = request.kv_transfer_params.pop(LOCAL, None)
        if self._loads(remote):
            return
        if num_external_tokens == 0 or cached is None:
            self._let_go(request, remote)
            return
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
            if producing is None or not producing.concurrent:
                continue
            prompt = producing.request.num_prompt_tokens
            stop = min(producing.request.num_computed_tokens + count, prompt)
            if stop <= producing.sent:
                continue
            assert output.kv_connector_block_state is not None
            blocks = output.kv_connector_block_state.get_block_ids(request_id)
            assert blocks is not None
            ids = self._cache_config.select_transfer_block_ids(blocks)
            meta.computing.append(Send(request_id, producing.transfer_id, prompt, stop, _copy(ids)))
            producing.sent = stop
        self._pace(meta)
        return meta

    def finished(self, request: Request, block_ids: Blocks) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks must stay, and what the router is told."""
        self._forget_load(request)
        if self._asks_who(request):
            return False, self._answer(None, 0)
        producing = self._producing.pop(request.request_id, None)
        if producing is None:
            return False, None
        computed = min(request.num_computed_tokens, request.num_prompt_tokens)
        done = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if done and computed == request.num_prompt_tokens:
            ids = _copy(self._cache_config.select_transfer_block_ids(block_ids))
            self._next.held.append(Send(request.request_id, producing.transfer_id, computed, computed, ids))
            self._held.add(request.request_id)
            return True, self._answer(producing.transfer_id, computed)
        if producing.sent:
            self._next.dropped.add(request.request_id)
            self._held.add(request.request_id)
            return True, None
        if producing.concurrent:
            self._next.rejected.append(producing.transfer_id)
        return False, None

    def on_output(self, output: KVConnectorOutput) -> None:
        """Take what the workers have finished."""
        if output.finished_sending or output.finished_recving:
            self._idle_since = None
        self._held -= output.finished_sending or set()
        if isinstance(again := output.kv_connector_worker_meta, Repeated):
            # Each rank lets the producer go once it is done: for one that had its part already nothing is new.
            self._next.loads += [self._loading[name].let_go for name in again.request_ids if name in self._loading]
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
        time.sleep(min(MAX_IDLE_S, IDLE_SHARE * (now - self._idle_since)))

    def _remote(self, request: Request) -> Consume | None:
        try:
            remote = consume(request.kv_transfer_params)
        except InputError as error:
            remote = None
            _log.warning("request %s: %s; its prompt is computed here", request.request_id, error)
        if remote is not None and not self._consumer:
            _log.warning("request %s: do_remote_prefill, but this instance is no consumer", request.request_id)
            remote = None
        if remote is None and request.kv_transfer_params:
            request.kv_transfer_params["do_remote_prefill"] = False
        return remote

    def _loads(self, remote: Consume) -> bool:
        """Whether a request of this transfer is being loaded."""
        return any(load.transfer_id == remote.transfer_id for load in self._loading.values())

    def _let_go(self, request: Request, remote: Consume) -> None:
        """The producer may have its blocks back: this consumer needs nothing of them."""
        stop = max(1, last_token(request, remote))
        empty: Blocks = tuple([] for _ in self._cache_config.transfer_groups)
        self._next.loads.append(_load(request, remote, stop, stop, empty))

    def _forget_load(self, request: Request) -> None:
        """The request ended before it was scheduled, or while its KV is loaded."""
        if request.request_id in self._loading:
            self._next.aborted_loads.add(request.request_id)
        remote = self._remote(request)
        if remote is not None:
            assert request.kv_transfer_params is not None
            request.kv_transfer_params["do_remote_prefill"] = False
            if not self._loads(remote):
                self._let_go(request, remote)

    def _asks_who(self, request: Request) -> bool:
        try:
            wanted = produce(request.kv_transfer_params)
        except InputError:
            return False
        return wanted is not None and wanted.describe and self._producer

    def _answer(self, transfer_id: str | None, num_tokens: int) -> dict[str, Any]:
        """`kv_transfer_params` of a producer's response, as a consumer takes them."""
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_engine_id": self._engine_id,
            "remote_addresses": list(self._addresses),
            "remote_num_tokens": num_tokens,
        }


def last_token(request: Request, remote: Consume) -> int:
    """Where the load stops: before the prompt's last token, or where the producer's KV ends."""
    stop = int(request.num_prompt_tokens) - 1
    return stop if remote.remote_num_tokens is None else min(stop, remote.remote_num_tokens)


def drop_last_token(request: Request) -> None:
    """Let the producer compute one token less.

    vLLM frees the blocks of a sliding window that the *next* token does not see. The consumer computes the prompt's
    last token itself, and that one sees a token further back; so it must be the producer's next token.
    """
    params = request.kv_transfer_params
    if params is None or params.get("_hetkv_shortened") or request.num_prompt_tokens < 2:
        return
    params["_hetkv_shortened"] = True
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
        remote.transfer_id,
        remote.remote_engine_id,
        remote.remote_addresses,
        cached,
        stop,
        _copy(blocks),
    )


def _copy(blocks: Blocks) -> Blocks:
    """The scheduler goes on changing its lists."""
    return tuple(list(ids) for ids in blocks)
