"""One vLLM engine in this process, driven like the other engines' instances: `VllmInstance`.

vLLM has a scheduler of its own, so requests go through it and through the connector, as they would in a server; this
class steps it. It takes both roles, on the CPU or one GPU. It computes a prompt's last token itself, and so its first
token, too: the one that the prefill instance chose is not used.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
)

import numpy as np
import vllm
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from hetkv.errors import HetkvError, InputError, WaitTimeoutError
from hetkv.integrations.first_token import FirstToken
from hetkv.integrations.instance import WAIT_S, Generated
from hetkv.integrations.sampling import Sampling
from hetkv.integrations.vllm.worker import WorkerSide
from hetkv.transport.instance import Instance as Book

DTYPES = ("float32", "float16", "bfloat16")
FEW = 2
"""Log-probabilities that vLLM gives of a token where only the chosen one's is asked for, and its rank's."""
IDLE_S = 0.0005
"""Wait between two looks at a transfer while the engine has nothing to compute."""


class VllmInstance:
    """The operations of `hetkv.integrations.instance.EngineInstance`. One thread at a time."""

    name = "vllm"

    def __init__(
        self,
        model: str,
        *,
        instance: str,
        secret: bytes | None = None,
        dtype: str = "float32",
        slots: int = 4,
        capacity: int = 1024,
        block_size: int = 32,
        chunk: int = 512,
        distributions: bool = False,
    ) -> None:
        """`slots`: sequences at a time; `chunk`: tokens of a step; `distributions`: of accepted requests are kept;
        vLLM has to know that when it gets them. Raises `InputError`."""
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: {', '.join(DTYPES)}")
        self.instance, self._count, self._keeps = instance, 0, distributions
        self._folder = tempfile.TemporaryDirectory(prefix="hetkv-vllm-")
        transfer = KVTransferConfig(
            kv_connector="HetKVConnector",
            kv_connector_module_path="hetkv.integrations.vllm",
            kv_role="kv_both",
            engine_id=instance,
            kv_load_failure_policy="fail",
            kv_connector_extra_config={} if secret is None else {"secret_file": self._secret_file(secret)},
        )
        settings = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=capacity,
            max_num_seqs=slots,
            max_num_batched_tokens=max(chunk, slots),
            enable_chunked_prefill=True,
            enable_prefix_caching=False,
            enforce_eager=True,
            block_size=block_size,
            num_gpu_blocks_override=1 + slots * -(-capacity // block_size),
            max_logprobs=-1,
            seed=0,
            kv_transfer_config=transfer,
            disable_log_stats=True,
        )
        try:
            self.engine = LLMEngine.from_engine_args(settings)
        except (OSError, ValueError) as error:
            self._folder.cleanup()
            raise InputError(f"{model}: vLLM does not load it: {error}") from None
        self.facts_ = {"vllm": vllm.__version__, "dtype": dtype, "block_size": block_size}
        self._addresses: dict[str, list[str]] = {}
        self._sent: dict[str, Any] = {}
        self._accepted: dict[str, tuple[str, Any, int]] = {}
        self._outputs: dict[str, RequestOutput] = {}
        self._first_ns: dict[str, int] = {}

    def close(self) -> None:
        """End all requests and links, and the engine."""
        with suppress(Exception):  # vLLM ends its own parts in an order of its own
            self.engine.engine_core.shutdown()
        self._folder.cleanup()

    def listen(self, address: str = "127.0.0.1:0") -> str:
        """Where decode instances connect: the connector listens since its start. `address` is not used."""
        return self._worker.address

    def connect(self, source: str, addresses: list[str]) -> None:
        """Link to the prefill instance `source`. Raises `IncompatibleError` where the models differ."""
        self._receiver.connect(Book(source, tuple(addresses)))
        self._addresses[source] = list(addresses)

    def prefill(self, request_id: str, tokens: list[int], sampling: Sampling | None = None) -> Generated:
        """Compute a prompt and choose its first token; the KV leaves as it is computed. `finish` waits for its end."""
        start = time.monotonic_ns()
        order = {"do_remote_decode": True, "rendezvous": "concurrent", "transfer_id": request_id}
        name = self._add(tokens, 1, sampling, order)
        handle = None
        while name not in self._outputs:
            self._step()
            handle = handle or self._outgoing(name)
        self._sent[request_id] = handle = handle or self._outgoing(name)
        made = self._generated(name, start, 0)
        if handle is not None:
            handle.carry(FirstToken(token=made.tokens[0], logprob=made.logprobs[0]).encode())
        return made

    def finish(self, request_id: str, timeout: float = WAIT_S) -> None:
        """Wait until a prefilled request has been received, and give its room back. Raises what ended it."""
        handle = self._sent.pop(request_id)
        if handle is None:
            raise HetkvError(f"request {request_id}: its KV was not offered; see the log")
        try:
            self._until(handle.done, timeout, f"request {request_id} was not received")
            handle.wait(0.001)
        finally:
            with suppress(WaitTimeoutError):
                self._until(lambda: not self._busy, timeout, "")

    def accept(self, request_id: str, source: str, tokens: list[int], max_new_tokens: int) -> None:
        """Make room for a prompt that instance `source` computes, and give its ticket; returns at once."""
        if source not in self._addresses:
            raise InputError(f"instance {source} is not connected")
        order = {"do_remote_prefill": True, "transfer_id": request_id, "remote_engine_id": source,
                 "remote_addresses": self._addresses[source]}  # fmt: skip
        name = self._add(tokens, max_new_tokens, None, order, self._keeps)
        self._until(lambda: self._incoming(name) is not None or name in self._outputs, WAIT_S, "no ticket")
        self._accepted[request_id] = name, self._incoming(name), max_new_tokens

    def decode(
        self,
        request_id: str,
        max_new_tokens: int,
        distributions: int = 0,
        timeout: float = WAIT_S,
    ) -> Generated:
        """Go on with an accepted request once its KV is there. Raises what ended it. Greedy, as `accept` began it,
        whatever the prefill instance's sampling is."""
        start = time.monotonic_ns()
        name, handle, count = self._accepted.pop(request_id)
        if max_new_tokens != count:
            raise InputError(f"request {request_id} was accepted for {count} tokens, not {max_new_tokens}")
        self._until(lambda: name in self._outputs, timeout, f"request {request_id} has not arrived")
        if handle is not None:
            handle.wait(0.001)
        return self._generated(name, start, distributions)

    def generate(
        self, tokens: list[int], max_new_tokens: int, sampling: Sampling | None = None, distributions: int = 0
    ) -> Generated:
        """The same without a transfer: what this engine alone says."""
        start = time.monotonic_ns()
        name = self._add(tokens, max_new_tokens, sampling, None, distributions > 0)
        self._until(lambda: name in self._outputs, WAIT_S, "the request has not ended")
        return self._generated(name, start, distributions)

    def facts(self) -> dict[str, Any]:
        """Versions and settings of the engine."""
        return dict(self.facts_)

    def stats(self) -> Mapping[str, Any]:
        """Counters of both nodes."""
        assert self._worker._sender is not None
        return {"sender": self._worker._sender.stats(), "receiver": self._receiver.stats()}

    @property
    def _worker(self) -> WorkerSide:
        worker: WorkerSide = get_kv_transfer_group()._worker
        return worker

    @property
    def _receiver(self) -> Any:
        assert self._worker._receiver is not None
        return self._worker._receiver

    @property
    def _busy(self) -> bool:
        return bool(self.engine.engine_core.engine_core.scheduler.has_requests())

    def _secret_file(self, secret: bytes) -> str:
        path = Path(self._folder.name) / "secret"
        path.touch(0o600)
        path.write_bytes(secret)
        return str(path)

    def _add(
        self,
        tokens: list[int],
        count: int,
        sampling: Sampling | None,
        order: dict[str, Any] | None,
        distributions: bool = False,
    ) -> str:
        """Queue a request; its name."""
        if sampling is not None and sampling.temperature > 0:
            raise InputError("vLLM's sampling is its own: this instance is greedy")
        self._count += 1
        name = f"hetkv-{self._count}"
        params = SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1 if distributions else 0,
            output_kind=RequestOutputKind.CUMULATIVE,
            extra_args=None if order is None else {"kv_transfer_params": order},
        )
        self.engine.add_request(name, {"prompt_token_ids": list(tokens)}, params)
        return name

    def _step(self) -> None:
        for output in self.engine.step():
            if output.outputs and output.outputs[0].token_ids:
                self._first_ns.setdefault(output.request_id, time.monotonic_ns())
            if output.finished:
                self._outputs[output.request_id] = output

    def _until(self, condition: Callable[[], bool], timeout: float, else_: str) -> None:
        """Step until it is true. Raises `WaitTimeoutError`."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"{else_} within {timeout:g} s")
            if self._busy:
                self._step()
            else:
                time.sleep(IDLE_S)

    def _outgoing(self, name: str) -> Any:
        """The transfer of a request that is computed here."""
        sending = self._worker._sending
        assert sending is not None
        found = (out.tx for own, out in sending._out.items() if own.startswith(f"{name}-"))
        return next(found, None)

    def _incoming(self, name: str) -> Any:
        """The transfer of a request that is computed elsewhere, once it has a ticket."""
        loading = self._worker._loading
        assert loading is not None
        return next((load.rx for own, load in loading._in.items() if own.startswith(f"{name}-")), None)

    def _generated(self, name: str, start_ns: int, distributions: int) -> Generated:
        output = self._outputs.pop(name).outputs[0]
        if output.finish_reason == "error":
            raise HetkvError(f"vLLM ended {name} with an error")
        tokens, stop = list(output.token_ids), time.monotonic_ns()
        found = output.logprobs or []
        kept = [_row(entries) if len(entries) > FEW else None for entries in found[:distributions]]
        chosen = [float(entries[token].logprob) for entries, token in zip(found, tokens, strict=True)]
        first = self._first_ns.pop(name, stop)
        return Generated(
            tokens=tokens, logprobs=chosen, start_ns=start_ns, first_ns=first, stop_ns=stop, distributions=kept
        )


def _row(entries: Mapping[int, Any]) -> list[float]:
    """Log-probabilities of the whole vocabulary."""
    row = np.full(1 + max(entries), -np.inf)
    for token, entry in entries.items():
        row[token] = entry.logprob
    return list(row.tolist())
