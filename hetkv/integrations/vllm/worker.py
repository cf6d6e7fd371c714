"""The worker's side: its caches as a pool, a sender and a receiver over it, and what it reports to the scheduler."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from hetkv.integrations.vllm.fingerprint import fingerprint_of
from hetkv.integrations.vllm.idle import block_while_quiet, set_quiet
from hetkv.integrations.vllm.layouts import Caches, caches
from hetkv.integrations.vllm.loading import Loading
from hetkv.integrations.vllm.metadata import Load, Metadata, Reported
from hetkv.integrations.vllm.metrics import HetKVStats
from hetkv.integrations.vllm.sending import Sending
from hetkv.integrations.vllm.settings import Settings
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

LOAD_WAIT_S = 0.002
"""How long a step without tokens waits for a load that should end any moment. A longer wait costs more than it gains:
vLLM's engine process spins while a worker has not answered."""


class WorkerSide:
    """One rank. vLLM calls it from one thread; transfers run in the engine's own threads."""

    def __init__(self, config: VllmConfig, cache_config: KVCacheConfig, settings: Settings) -> None:
        assert config.kv_transfer_config is not None
        self._config, self._cache_config, self._settings = config, cache_config, settings
        self._role = config.kv_transfer_config
        self._secret = settings.secret()
        self._changed = threading.Event()
        self._stats = HetKVStats()
        self._counted = {"bytes": 0, "saturated": 0}
        self._tensors: Mapping[str, torch.Tensor] | None = None
        self._caches: Caches | None = None
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._sending: Sending | None = None
        self._loading: Loading | None = None
        self._failed_blocks: set[int] = set()
        self._computes = False
        self.address = ""
        """Where this rank's sender listens; empty for a consumer."""

    def register(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Describe the caches and start the transport. Raises `InputError` for what cannot be served."""
        self._tensors = tensors
        self._caches = caches(self._config, self._cache_config, tensors)
        shards = self._caches.instance_shards
        options = {
            "secret": self._secret,
            "tls": self._settings.tls,
            "instance": self._role.engine_id,
            "rank": self._caches.rank,
            "instance_shards": shards if len(shards) > 1 else (),
            "config": self._settings.transfer,
            "fingerprint": fingerprint_of(self._config),
        }
        if self._role.is_kv_producer:
            self._sender = Sender(self._caches.pool, **options)
            self.address = self._sender.listen(self.address or self._settings.address(self._caches.rank))
            self._sending = Sending(self._sender, self._caches, self._stats, self._changed.set, on_all_ranks)
        if self._role.is_kv_consumer:
            self._receiver = Receiver(self._caches.pool, **options)
            self._loading = Loading(self._receiver, self._caches, self._stats, self._changed.set)
        block_while_quiet()

    def unregister(self) -> None:
        """The caches' memory goes: all links end, so that nothing reads or writes it. vLLM has let transfers end."""
        self._count()
        self.close()
        self._sender = self._receiver = self._sending = self._loading = None
        self._counted = dict.fromkeys(self._counted, 0)

    def restore(self) -> None:
        """The memory is there again, at the same addresses: listen where this rank did before."""
        if self._tensors is not None and self._sender is None and self._receiver is None:
            self.register(self._tensors)

    def preempt(self, meta: Metadata) -> None:
        """Before anything is overwritten in this step."""
        if self._sending is not None:
            self._sending.preempt(meta)

    def begin_step(self, meta: Metadata) -> None:
        """Before the model runs."""
        self._computes = meta.computes
        if self._sending is not None:
            self._sending.begin_step(meta)

    def begin_loads(self, meta: Metadata) -> None:
        """After the step's other writes to the caches have been started."""
        if self._loading is not None:
            self._loading.begin(meta)

    def layer_computed(self, name: str) -> None:
        """A layer's KV of this step is in the cache."""
        if self._sending is not None:
            self._sending.send_layer(name)

    def end_step(self) -> None:
        """After the model has run."""
        if self._sending is not None:
            self._sending.end_step()

    def results(self, finished: set[str]) -> KVConnectorTransferResults:
        """What has ended. A step without tokens waits a moment where a load is about to."""
        self._changed.clear()
        out = self._poll(finished)
        idle = not (self._computes or out.finished_sending or out.finished_recving)
        if idle and self._loading is not None and self._loading.due:
            self._changed.wait(LOAD_WAIT_S)
            out = self._poll(finished)
        set_quiet(idle)
        return out

    def failed_blocks(self) -> set[int]:
        """Blocks of the loads that failed since the last call, where ids are unique: in a model of one cache group."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def reported(self) -> Reported | None:
        """Which loads began again since the last call, and what came with requests."""
        if self._loading is None or not (self._loading.repeated or self._loading.payloads):
            return None
        reported = Reported(self._loading.repeated, self._loading.payloads)
        self._loading.repeated, self._loading.payloads = set(), {}
        return reported

    def stats(self) -> HetKVStats | None:
        """What was counted since the last call."""
        self._count()
        return self._stats.take()

    def _count(self) -> None:
        for key, name in (("payload_bytes", "bytes"), ("saturated", "saturated_elements")):
            total = sum(node.stats()[key] for node in (self._sender, self._receiver) if node is not None)
            short = "bytes" if key == "payload_bytes" else "saturated"
            if total > self._counted[short]:
                self._stats.add(name, total - self._counted[short])
                self._counted[short] = total

    def close(self) -> None:
        """End all transfers and links."""
        if self._loading is not None:
            self._loading.close()
        for node in (self._sender, self._receiver):
            if node is not None:
                node.close()

    def _poll(self, finished: set[str]) -> KVConnectorTransferResults:
        out = KVConnectorTransferResults()
        if self._sending is not None:
            out.finished_sending = self._sending.poll(finished)
        if self._loading is not None:
            done = self._loading.poll()
            out.finished_recving = done.finished
            for load in done.failed:
                self._report(load, out)
        return out

    def _report(self, load: Load, out: KVConnectorTransferResults) -> None:
        """By block, so that what was held before is kept; with several cache groups vLLM takes the request alone."""
        assert self._caches is not None
        if len(self._cache_config.kv_cache_groups) > 1:
            out.failed_recving.add(load.request_id)
            return
        size = self._cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._failed_blocks.update(load.blocks[0][load.cached // size : -(-load.stop // size)])


def on_all_ranks(statements: list[bool]) -> list[bool]:
    """Which of these hold on every rank of this instance. All ranks call it in the same step, with as many."""
    group = get_tp_group()
    if group.world_size == 1:
        return statements
    held = torch.tensor(statements, dtype=torch.int32)
    torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MIN, group.cpu_group)
    return [bool(each) for each in held.tolist()]
