"""vLLM's own scheduler with this connector's scheduler side and no worker: a test says what workers would report."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any, Literal, NamedTuple

import torch
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from hetkv.integrations.vllm.connector import HetKVConnector
from hetkv.integrations.vllm.metadata import Metadata, Reported
from tests.vllm.engines import DTYPE

BLOCK = 32
STOP_TOKEN, TOKEN = 7, 9
PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}


def consume(name: str, **more: Any) -> dict[str, Any]:
    """`kv_transfer_params` of a consumer's request: nothing listens at this address."""
    known = {"transfer_id": name, "remote_engine_id": "p", "remote_addresses": ["127.0.0.1:9"]}
    return {"do_remote_prefill": True, **known, **more}


class Step(NamedTuple):
    """What the scheduler ordered, and what it gave the server once the workers had answered."""

    output: SchedulerOutput
    orders: Metadata
    answers: list[EngineCoreOutput]


class Scheduled:
    """Requests of one instance, stepped by a test."""

    def __init__(
        self,
        model: str,
        role: Literal["kv_producer", "kv_consumer"],
        *,
        policy: Literal["recompute", "fail"] = "fail",
        blocks: int = 64,
        chunk: int = 4 * BLOCK,
        window: int | None = None,
    ) -> None:
        """`chunk`: tokens of a step; `window`: of the layers of a second cache group."""
        transfer = KVTransferConfig(
            kv_connector="HetKVConnector", kv_connector_module_path="hetkv.integrations.vllm", kv_role=role,
            engine_id="e", kv_load_failure_policy=policy,
        )  # fmt: skip
        settings = EngineArgs(
            model=model, skip_tokenizer_init=True, dtype=DTYPE, max_model_len=2048, block_size=BLOCK,
            enforce_eager=True, max_num_batched_tokens=chunk, max_num_seqs=8, enable_prefix_caching=True,
            kv_transfer_config=transfer, async_scheduling=False, disable_hybrid_kv_cache_manager=False,
        )  # fmt: skip
        config = settings.create_engine_config()
        config.cache_config.kv_cache_layout = "LBNHC"  # a worker finds it out before there is a connector
        config.cache_config.num_gpu_blocks = blocks
        kind: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
        groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**kind))]
        if window is not None:
            groups.append(KVCacheGroupSpec(["window"], SlidingWindowSpec(sliding_window=window, **kind)))
        self.core = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        assert isinstance(self.core.connector, HetKVConnector)
        self.side = self.core.connector._at_scheduler
        self._names = itertools.count()
        init_none_hash(sha256)

    def add(self, prompt: list[int], params: dict[str, Any] | None = None, max_tokens: int = 16) -> Request:
        """Queue a request."""
        sampling = SamplingParams(max_tokens=max_tokens, extra_args={"kv_transfer_params": params} if params else None)
        sampling.update_from_generation_config({}, STOP_TOKEN)
        request = Request(
            request_id=f"cmpl-{next(self._names)}-0-0123abcd",
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.core.add_request(request)
        return request

    def abort(self, request: Request) -> None:
        """The client has left."""
        self.core.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)

    def step(
        self,
        *,
        sent: Collection[str] | None = None,
        received: Collection[str] | None = None,
        failed_blocks: Iterable[int] = (),
        failed: Iterable[str] = (),
        reported: Reported | None = None,
        stop: bool = False,
    ) -> Step:
        """Schedule, and let the workers answer: with a token for each request whose prompt is computed (the last one
        where `stop`), and with what they report of transfers."""
        output = self.core.schedule()
        assert isinstance(output.kv_connector_metadata, Metadata)
        names = list(output.num_scheduled_tokens)
        tokens = []
        for name in names:
            request = self.core.requests[name]
            ready = request.num_computed_tokens >= request.num_prompt_tokens
            tokens.append([STOP_TOKEN if stop else TOKEN] if ready else [])
        transfers = KVConnectorOutput(
            finished_sending=sent,  # type: ignore[arg-type]  # vLLM's own tests give lists, too
            finished_recving=set(received) if received is not None else None,
            invalid_block_ids=set(failed_blocks),
            failed_recving=set(failed),
            kv_connector_worker_meta=reported,
        )
        answer = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=tokens,
            kv_connector_output=transfers,
        )
        given = self.core.update_from_output(output, answer)
        answers = [item for outputs in given.values() for item in outputs.outputs]
        return Step(output, output.kv_connector_metadata, answers)

    def blocks(self, request: Request) -> list[int]:
        """Those of its first cache group."""
        return list(self.core.kv_cache_manager.get_block_ids(request.request_id)[0])

    def cached(self, blocks: Iterable[int]) -> int:
        """How many of these the prefix cache would give to other requests."""
        pool = self.core.kv_cache_manager.block_pool
        return sum(pool.blocks[at].block_hash is not None for at in blocks)

    @property
    def free_blocks(self) -> int:
        """That no request holds."""
        return int(self.core.kv_cache_manager.block_pool.get_num_free_blocks())

    def check_empty(self) -> None:
        """No request, block, transfer or note of one is left."""
        self.core.schedule()
        assert not self.core.requests
        assert not self.core.running
        assert not len(self.core.waiting)
        assert not len(self.core.kv_holding_waiting)
        assert self.free_blocks == self.core.kv_cache_manager.block_pool.num_gpu_blocks - 1
        side = self.side
        assert not any([side._producing, side._held, side._loading, side._cached, side._payloads, side._settled])
        assert not side.pending
