"""vLLM engines, each in a process of its own that is forked off the test's: importing vLLM is what costs time."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property
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
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

DTYPE = "float32" if torch.cpu._is_amx_tile_supported() else "bfloat16"
"""What vLLM computes in: its AMX kernels keep bfloat16 in tiles, which the connector rejects."""
TIMEOUT_S = float(os.environ.get("HETKV_VLLM_TEST_TIMEOUT_S", "600"))


def checkpoint(
    folder: Path, *, layers: int = 2, kv_heads: int = 3, head_dim: int = 64, queries: int = 1, seed: int = 0
) -> str:
    """A random-weight Llama: its output depends on every KV entry."""
    path = folder / f"llama_{layers}_{kv_heads}_{head_dim}_{seed}"
    if not (path / "config.json").exists():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
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
    computed: int
    """Tokens that the model ran for here: prompt and output."""
    choices: list[list[int]]
    """Tokens of each choice, where several were asked for."""


class Warnings(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


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
                **({"kv_buffer_device": device} if (device := options.pop("kv_buffer_device", None)) else {}),
            )
        settings = {
            "model": model,
            "skip_tokenizer_init": True,
            "dtype": DTYPE,
            "max_model_len": 2048,
            "enforce_eager": True,
            "block_size": block_size,
            "enable_prefix_caching": False,
            "max_num_seqs": 8,
            "num_gpu_blocks_override": 8192 // block_size,
            "seed": 0,
            "kv_transfer_config": transfer,
            "disable_log_stats": True,
        }
        self.engine = LLMEngine.from_engine_args(EngineArgs(**{**settings, **options}))
        self.warnings = Warnings()
        logging.getLogger("hetkv").addHandler(self.warnings)
        self.outputs: dict[str, Output] = {}
        self.computed: Counter[str] = Counter()
        self.preempted = 0
        self.paused = False
        schedule = self.scheduler.schedule

        def counted(*arguments: Any, **options: Any) -> Any:
            output = schedule(*arguments, **options)
            self.computed.update(output.num_scheduled_tokens)
            self.preempted += len(output.preempted_req_ids or ())
            return output

        self.scheduler.schedule = counted
        self.observed: dict[str, list[float]] = defaultdict(list)
        worker = getattr(get_kv_transfer_group(), "_worker", None) if has_kv_transfer_group() else None
        if worker is not None:
            observe = worker._stats.observe
            worker._stats.observe = lambda name, value: (self.observed[name].append(value), observe(name, value))

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
                # vLLM's own request ids are ours with a suffix.
                own = re.compile(r"(\d+_)?" + re.escape(output.request_id) + "-")
                computed = sum(n for name, n in self.computed.items() if own.match(name))
                choices = [list(choice.token_ids) for choice in output.outputs]
                self.outputs[output.request_id] = Output(
                    list(first.token_ids), first.finish_reason, output.kv_transfer_params, computed, choices
                )

    def add(self, name: str, prompt: list[int], tokens: int, params: dict[str, Any] | None, n: int) -> None:
        """`n` choices, each of the most probable tokens: vLLM wants sampling where they are several."""
        options = SamplingParams(
            n=n,
            temperature=float(n > 1),
            top_k=1,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"kv_transfer_params": params} if params is not None else None,
        )
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, options)

    def take(self, name: str) -> Output | None:
        return self.outputs.get(name)

    def abort(self, name: str) -> None:
        self.engine.abort_request([name])

    def step_once(self) -> None:
        """For an engine that is paused."""
        self.step()

    def has_work(self) -> bool:
        return self.scheduler.has_requests()

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.kv_cache_manager.reset_prefix_cache()

    def groups(self) -> list[str]:
        """Kinds of the cache groups."""
        return [type(group.kv_cache_spec).__name__ for group in self.scheduler.kv_cache_config.kv_cache_groups]

    def preemptions(self) -> int:
        return self.preempted

    def pause(self, paused: bool) -> None:
        self.paused = paused

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def held(self) -> dict[str, Any]:
        """Sizes of everything that must be empty where nothing is under way."""
        side, worker = self.scheduler.connector._scheduler, get_kv_transfer_group()._worker
        nodes = [node for node in (worker._sender, worker._receiver) if node is not None]
        return {
            "scheduler": [len(self.scheduler.requests), len(side._producing), len(side._held), len(side._loading)],
            "sending": len(worker._sending._out) if worker._sending else 0,
            "loading": len(worker._loading._in) if worker._loading else 0,
            "nodes": [[node.engine.open_requests] for node in nodes],
            "transport": [
                {key: node.stats()[key] for key in ("open_requests", "pending_tickets", "granted_slots")}
                for node in nodes
            ],
        }

    def take_observed(self, name: str) -> list[float]:
        """Observations of one of the connector's histograms since the last call."""
        return self.observed.pop(name, [])

    def break_connecting(self, broken: bool) -> None:
        """Let the receiver's `connect` fail in a way that nobody foresaw."""
        receiver = get_kv_transfer_group()._worker._receiver
        if broken:
            receiver.connect = lambda address: [][0]
        else:
            del receiver.connect

    def connector(self, method: str) -> None:
        """Call one of the connector's methods at its worker, as vLLM's worker does."""
        getattr(get_kv_transfer_group(), method)()

    def links(self) -> int:
        """How many peers the worker is linked to."""
        worker = get_kv_transfer_group()._worker
        return sum(len(node.peers) for node in (worker._sender, worker._receiver) if node is not None)

    def resources(self) -> list[int]:
        """Threads and open descriptors of this process."""
        return [len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))]

    def warned(self) -> list[str]:
        """What the connector and its transport warned of."""
        return self.warnings.texts

    def stats(self) -> dict[str, int]:
        """The transport's counters since the start."""
        worker = get_kv_transfer_group()._worker
        return (worker._sender or worker._receiver).stats()


def _serve(pipe: Connection, model: str, role: str | None, block_size: int, options: dict[str, Any]) -> None:
    """Body of an engine's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
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
            if name == "stop":
                core.engine.engine_core.shutdown()
                os._exit(0)
            pipe.send(getattr(core, name)(*arguments))
        core.step()


_live: set[Engine] = set()


@atexit.register
def _kill_all() -> None:
    """A test that failed leaves its engines; the interpreter would wait for them."""
    for engine in list(_live):
        engine.kill()


class Engine:
    """One instance. `role` is `kv_producer`, `kv_consumer`, `kv_both`, or `None` for one without a connector."""

    def __init__(self, model: str, role: str | None, block_size: int = 128, **options: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, model, role, block_size, options))
        self.process.start()
        theirs.close()
        _live.add(self)
        self._count = 0

    @cached_property
    def error(self) -> str | None:
        """Why it did not start, or `None`. The first look waits, so that several engines start side by side."""
        error: str | None = self._receive("start")
        return error

    def call(self, method: str, *arguments: Any) -> Any:
        """Run a method of `Core` between two steps."""
        assert self.error is None, self.error
        self._pipe.send((method, arguments))
        return self._receive(method)

    def add(
        self, prompt: list[int], tokens: int = 12, params: dict[str, Any] | None = None, *, n: int = 1, name: str = ""
    ) -> str:
        """Queue a request; returns its id, which is `name` where one is given."""
        self._count += 1
        name = name or f"{id(self)}-{self._count}"
        self.call("add", name, prompt, tokens, params, n)
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
        _live.discard(self)
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def close(self) -> None:
        if self.error is None:
            self._pipe.send(("stop", ()))
            self.process.join(20)
        self.kill()

    def _receive(self, what: str) -> Any:
        if not self._pipe.poll(TIMEOUT_S):
            os.kill(self.process.pid, signal.SIGUSR1)  # its stacks are written to stderr
            self.process.join(1)
            raise AssertionError(f"{what}: no answer within {TIMEOUT_S} s")
        return self._pipe.recv()


def until(condition: Callable[[], bool], timeout: float = TIMEOUT_S) -> None:
    """Poll for what happens in other processes."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.002)


class Pair:
    """A producer and a consumer, and the test as their router."""

    def __init__(self, producer: Engine, consumer: Engine) -> None:
        self.producer, self.consumer = producer, consumer
        assert (producer.error, consumer.error) == (None, None)
        self.free = producer.call("free_blocks"), consumer.call("free_blocks")

    def prefill_first(self, prompt: list[int], tokens: int = 12) -> Output:
        """Prefill, then decode with what the producer answered."""
        first = self.producer.run(prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False})
        return self.consumer.run(prompt, tokens, first.params)

    def concurrent(self, prompt: list[int], tokens: int = 12) -> Output:
        """Both at once, under one transfer id."""
        names = self.begin_concurrent(prompt, tokens)
        self.producer.wait(names[0])
        return self.consumer.wait(names[1])

    def begin_concurrent(
        self, prompt: list[int], tokens: int = 12, known: dict[str, Any] | None = None
    ) -> tuple[str, str]:
        """Names of the two requests. `known`: what the producer said of itself, where it cannot answer now."""
        transfer = uuid.uuid4().hex
        known = known or self.describe()
        decode = self.consumer.add(prompt, tokens, {**known, "transfer_id": transfer})
        order = {"do_remote_decode": True, "rendezvous": "concurrent", "transfer_id": transfer}
        return self.producer.add(prompt, 1, order), decode

    def describe(self) -> dict[str, Any]:
        """Who the producer is, as it says itself."""
        params = self.producer.run([1], 1, {"do_remote_decode": True, "describe": True}).params
        assert params is not None
        return {name: params[name] for name in ("do_remote_prefill", "remote_engine_id", "remote_addresses")}

    def settled(self) -> None:
        """Wait until both sides hold nothing: no request, no block, no slot, no ticket."""
        for engine, free in zip((self.producer, self.consumer), self.free, strict=True):
            until(lambda engine=engine, free=free: engine.call("free_blocks") == free)
            until(lambda engine=engine: not any(flatten(engine.call("held"))))

    def close(self) -> None:
        self.producer.close()
        self.consumer.close()


def flatten(values: Any) -> list[Any]:
    """All leaves."""
    if isinstance(values, dict):
        values = list(values.values())
    return [leaf for value in values for leaf in flatten(value)] if isinstance(values, list) else [values]
