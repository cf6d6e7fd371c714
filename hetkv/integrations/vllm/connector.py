"""`HetKVConnector`: what vLLM loads. It hands each call to the side that this instance of it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from hetkv.errors import InputError
from hetkv.integrations.vllm.content import check_hashes
from hetkv.integrations.vllm.limits import check_config
from hetkv.integrations.vllm.metadata import Blocks, Metadata, WorkerAddress
from hetkv.integrations.vllm.metrics import HetKVPromMetrics, HetKVStats
from hetkv.integrations.vllm.preflight import MULTI, NOT_IN_MULTI
from hetkv.integrations.vllm.scheduler import SchedulerSide
from hetkv.integrations.vllm.settings import Settings
from hetkv.integrations.vllm.worker import WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class HetKVConnector(KVConnectorBase_V1, SupportsHMA):
    """Moves KV between vLLM instances that may differ in block size, layout, dtype and tensor parallelism."""

    _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        settings = Settings.parse(transfer.kv_connector_extra_config)
        check_config(vllm_config, sleeps=hasattr(KVConnectorBase_V1, "supports_sleep_mode"))
        check_hashes(vllm_config)
        running = get_current_vllm_config_or_none()
        outer = running.kv_transfer_config if running is not None else None
        if outer is not None and outer.kv_connector == MULTI:
            raise InputError(NOT_IN_MULTI)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            assert transfer.engine_id is not None
            self._scheduler = SchedulerSide(
                transfer.engine_id,
                kv_cache_config,
                transfer.is_kv_producer,
                transfer.is_kv_consumer,
                paced=vllm_config.parallel_config.data_parallel_size == 1,
                prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            )
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, settings)

    @property
    def _at_scheduler(self) -> SchedulerSide:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def _at_worker(self) -> WorkerSide:
        assert self._worker is not None
        return self._worker

    # Of the class: what vLLM asks before there is an instance.

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        settings = Settings.parse(extra_config)
        settings.secret()  # vLLM asks this before it loads a model: it does not matter where that is read
        return settings.layerwise

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: KVTransferConfig) -> bool:
        return True  # from vLLM 0.33 on, which then calls `unregister_kv_caches` and `restore_kv_caches`

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HetKVStats:
        return HetKVStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics:
        return HetKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Scheduler side.

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, KVConnectorHandshakeMetadata]) -> None:
        workers = {rank: worker for rank, worker in metadata.items() if isinstance(worker, WorkerAddress)}
        self._at_scheduler.set_addresses(workers)

    def on_new_request(self, request: Request) -> None:
        self._at_scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._at_scheduler.num_matched_tokens(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(self._kv_cache_config.transfer_group_ids)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._at_scheduler.after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self._at_scheduler.build_meta(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self._at_scheduler.on_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._at_scheduler.finished(request, (block_ids,))

    def request_finished_all_groups(self, request: Request, block_ids: Blocks) -> tuple[bool, dict[str, Any] | None]:
        return self._at_scheduler.finished(request, block_ids)

    def has_pending_push_work(self) -> bool:
        return self._at_scheduler.pending

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._at_worker.register(kv_caches)

    def unregister_kv_caches(self) -> None:
        self._at_worker.unregister()

    def restore_kv_caches(self) -> None:
        self._at_worker.restore()

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata:
        return WorkerAddress(self._at_worker.address)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, Metadata)
        self._at_worker.preempt(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Metadata)
        self._at_worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        meta = self._get_connector_metadata()
        assert isinstance(meta, Metadata)
        self._at_worker.begin_loads(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are complete before their request is scheduled."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        self._at_worker.layer_computed(layer_name)

    def wait_for_save(self) -> None:
        self._at_worker.end_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self.get_transfer_results(finished_req_ids)
        return results.finished_sending or None, results.finished_recving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._at_worker.results(finished_req_ids)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._at_worker.failed_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._at_worker.reported()

    def get_kv_connector_stats(self) -> HetKVStats | None:
        return self._worker.stats() if self._worker is not None else None

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.close()
