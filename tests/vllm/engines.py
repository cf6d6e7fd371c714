"""vLLM engines, each in a process of its own that is forked off the test's: importing vLLM is what costs time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
)

import torch
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

TIMEOUT_S = float(os.environ.get("HETKV_VLLM_TEST_TIMEOUT_S", "120"))


def checkpoint(folder: Path, *, layers: int = 2, kv_heads: int = 3, head_dim: int = 64, queries: int = 1) -> str:
    """A random-weight Llama: its output depends on every KV entry."""
    path = folder / f"llama_{layers}_{kv_heads}_{head_dim}"
    if not (path / "config.json").exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=kv_heads * queries * 32,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=kv_heads * queries,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=1024,
            max_position_embeddings=4096,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return str(path)


class Output(NamedTuple):
    """What a request came to."""

    tokens: list[int]
    finish_reason: str | None
    params: dict[str, Any] | None
    """`kv_transfer_params` of a producer's answer."""
    cached: int
    """Prompt tokens that were not computed here."""


class Core:
    """The engine in its process. Its methods are what `Engine.call` reaches."""

    def __init__(self, model: str, role: str | None, block_size: int, options: dict[str, Any]) -> None:
        transfer = None
        if role is not None:
            transfer = KVTransferConfig(
                kv_connector=options.pop("connector", "HetKVConnector"),
                kv_connector_module_path=options.pop("module", "hetkv.integrations.vllm"),
                kv_role=role,
                kv_load_failure_policy=options.pop("policy", "fail"),
                kv_connector_extra_config=options.pop("extra", {}),
            )
        settings = dict(
            model=model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2048,
            enforce_eager=True,
            block_size=block_size,
            enable_prefix_caching=False,
            max_num_seqs=8,
            num_gpu_blocks_override=8192 // block_size,
            seed=0,
            kv_transfer_config=transfer,
            disable_log_stats=True,
        )
        self.engine = LLMEngine.from_engine_args(EngineArgs(**{**settings, **options}))
        self.outputs: dict[str, Output] = {}
        self.paused = False

    @property
    def scheduler(self) -> Any:
        return self.engine.engine_core.engine_core.scheduler

    @property
    def busy(self) -> bool:
        return not self.paused and self.scheduler.has_requests()

    def step(self) -> None:
        for output in self.engine.step():
            if output.finished:
                first = output.outputs[0]
                self.outputs[output.request_id] = Output(
                    list(first.token_ids), first.finish_reason, output.kv_transfer_params, output.num_cached_tokens
                )
        # The engine's own bookkeeping of requests, and what an engine loop does where only a connector has work.
        if not self.engine.has_unfinished_requests() and self.scheduler.has_requests():
            self.engine.engine_core.get_output()

    def add(self, name: str, prompt: list[int], tokens: int, params: dict[str, Any] | None) -> None:
        extra = {"kv_transfer_params": params} if params is not None else None
        options = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, options)

    def take(self, name: str) -> Output | None:
        return self.outputs.get(name)

    def abort(self, name: str) -> None:
        self.engine.abort_request([name])

    def pause(self, paused: bool) -> None:
        self.paused = paused

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def state(self) -> dict[str, Any]:
        """What must be empty where nothing is under way, and the transport's counters."""
        side, worker = self.scheduler.connector._scheduler, get_kv_transfer_group()._worker
        return dict(
            scheduler=[len(self.scheduler.requests), len(side._producing), len(side._held), len(side._loading)],
            sending=len(worker._sending._out) if worker._sending else 0,
            loading=len(worker._loading._in) if worker._loading else 0,
            sender=worker._sender.stats() if worker._sender else {},
            receiver=worker._receiver.stats() if worker._receiver else {},
        )


def _serve(pipe: Connection, model: str, role: str | None, block_size: int, options: dict[str, Any]) -> None:
    """Body of an engine's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        core = Core(model, role, block_size, options)
        pipe.send(None)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise
    while True:
        while pipe.poll(0 if core.busy else None):
            try:
                name, arguments = pipe.recv()
            except EOFError:
                os._exit(0)
            pipe.send(getattr(core, name)(*arguments))
        core.step()


class Engine:
    """One instance. `role` is `kv_producer`, `kv_consumer`, `kv_both`, or `None` for one without a connector."""

    def __init__(self, model: str, role: str | None, block_size: int = 128, **options: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, model, role, block_size, options), daemon=True)
        self.process.start()
        theirs.close()
        self._count = 0
        self.error: str | None = self._receive("start")

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method of `Core` between two steps."""
        self._pipe.send((method, arguments))
        return self._receive(method)

    def add(self, prompt: list[int], tokens: int = 12, params: dict[str, Any] | None = None) -> str:
        """Queue a request; returns its id."""
        self._count += 1
        name = f"{id(self)}-{self._count}"
        self.call("add", name, prompt, tokens, params)
        return name

    def wait(self, name: str) -> Output:
        """A request's end."""
        until(lambda: self.call("take", name) is not None)
        output: Output = self.call("take", name)
        return output

    def run(self, prompt: list[int], tokens: int = 12, params: dict[str, Any] | None = None) -> Output:
        """One request to its end."""
        return self.wait(self.add(prompt, tokens, params))

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def close(self) -> None:
        self._pipe.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()

    def _receive(self, what: str) -> Any:
        assert self._pipe.poll(TIMEOUT_S), f"{what}: no answer within {TIMEOUT_S} s"
        return self._pipe.recv()


def until(condition: Callable[[], bool], timeout: float = TIMEOUT_S) -> None:
    """Poll for what happens in other processes."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.002)
