"""How to start a deployment: shell lines for vLLM and SGLang, one command for each pool.

Flags are those of `vllm serve` and of `python -m sglang.launch_server`. In vLLM the KV moves through hetkv's connector;
SGLang moves it by its own transfer back ends.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec

from hetkv.costmodel import Catalogue, Placement, load_catalogue, model_shape
from hetkv.engines import obstacle
from hetkv.simulator.deployment import Engine, Plan, PoolPlan, engine_of, use_of

ROUTER_PORT = 8000
FIRST_PORT = {"prefill": 8100, "decode": 8200, "aggregated": 8100}
BOOTSTRAP_PORT = 8998
MASTER_PORT, RPC_PORT = 5000, 13345
HOST, SECRET = "$HOST", "hetkv.secret"
"""In the connector's settings: the prefill host's address as decode hosts reach it, and the file with the secret."""

VISIBLE_DEVICES = {
    "nvidia": "CUDA_VISIBLE_DEVICES",
    "amd": "HIP_VISIBLE_DEVICES",
    "intel": "ZE_AFFINITY_MASK",
    "huawei": "ASCEND_RT_VISIBLE_DEVICES",
}
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


class Server(msgspec.Struct, frozen=True):
    """One pool as processes: `count` instances, each on `gpus` GPUs of `nodes` nodes with `per_node` GPUs used there.

    `share` instances fit one node. `notes` are comments for the reader.
    """

    pool: str
    role: str
    gpu: str
    vendor: str
    count: int
    gpus: int
    nodes: int
    per_node: int
    share: int
    port: int
    arguments: list[str]
    notes: list[str]
    dp: int = 1


def servers(plan: Plan, engine: str, gpus_per_node: Mapping[str, int] | None = None) -> list[Server]:
    """The pools of `plan` as servers of `engine` (`vllm` or `sglang`), without the program's own name.

    `gpus_per_node` by GPU name overrides the catalogue. `InputError` where the plan names an unknown GPU.
    """
    catalogue = load_catalogue(plan.catalogue)
    own = engine == plan.engine.name
    make = _vllm if engine == "vllm" else _sglang
    ports = dict(FIRST_PORT)
    found = []
    for pool in plan.pools:
        settings = engine_of(plan, pool)
        arguments, notes = make(plan, pool, settings)
        settings = msgspec.structs.replace(settings, name=engine, version=settings.version if own else None)
        node = (gpus_per_node or {}).get(catalogue.gpu(pool.gpu).name) or _node(catalogue, pool.gpu)
        place, shape = Placement(pool.tp, pool.pp, pool.dp), model_shape(plan.model)
        if why := obstacle(use_of(settings, place, shape, pool.role in KV_ROLES, node)):
            notes = [f"CANNOT BE STARTED: {why}", *notes]
        nodes = -(-pool.gpus // node)
        per_node = -(-pool.gpus // nodes)
        share = max(1, node // pool.gpus)
        vendor = catalogue.gpu(pool.gpu).vendor
        found.append(
            Server(
                pool.name,
                pool.role,
                pool.gpu,
                vendor,
                pool.count,
                pool.gpus,
                nodes,
                per_node,
                share,
                ports[pool.role],
                arguments,
                notes,
                pool.dp,
            )
        )
        ports[pool.role] += 10 * -(-share // 10)
    return found


def _node(catalogue: Catalogue, gpu: str) -> int:
    return int(catalogue.gpu(gpu).value("gpus_per_node"))


def _vllm(plan: Plan, pool: PoolPlan, engine: Engine) -> tuple[list[str], list[str]]:
    flags = ["--served-model-name", _name(plan.model)]
    flags += ["--tensor-parallel-size", str(pool.tp), "--pipeline-parallel-size", str(pool.pp)]
    if pool.dp > 1:
        flags += ["--data-parallel-size", str(pool.dp), "--enable-expert-parallel"]
    notes = []
    weights, note = _weights(engine.weight_dtype)
    flags += weights
    notes += note
    flags += ["--kv-cache-dtype", "auto" if engine.kv_dtype in TORCH_DTYPES else engine.kv_dtype]
    flags += ["--block-size", str(engine.block_size)]
    flags += ["--max-num-seqs", str(engine.max_num_seqs)]
    flags += ["--max-num-batched-tokens", str(engine.max_num_batched_tokens)]
    flags += ["--gpu-memory-utilization", f"{engine.memory_share:g}"]
    flags.append("--enable-chunked-prefill" if engine.chunked_prefill else "--no-enable-chunked-prefill")
    flags.append("--enable-prefix-caching" if engine.prefix_caching else "--no-enable-prefix-caching")
    if pool.kv_tokens is not None:
        flags += ["--num-gpu-blocks-override", str(pool.kv_tokens // engine.block_size)]
    if model_shape(plan.model).sliding_layers:
        if not engine.hybrid_kv_cache:
            flags.append("--disable-hybrid-kv-cache-manager")
        elif pool.role in KV_ROLES:  # with a connector, vLLM's own default is to disable it
            flags.append("--no-disable-hybrid-kv-cache-manager")
    if pool.role in KV_ROLES:
        assert plan.link is not None
        extra: dict[str, Any] = {"layerwise": plan.link.overlap == "layerwise", "secret_file": SECRET}
        connector: dict[str, Any] = {
            "kv_connector": "HetKVConnector",
            "kv_connector_module_path": "hetkv.integrations.vllm",
            "kv_role": KV_ROLES[pool.role],
            "kv_connector_extra_config": extra,
        }
        if pool.role == "prefill":
            extra["host"] = HOST
        else:
            connector["kv_load_failure_policy"] = "recompute"
        flags += ["--kv-transfer-config", json.dumps(connector, separators=(",", ":"))]
    return flags, notes


def _sglang(plan: Plan, pool: PoolPlan, engine: Engine) -> tuple[list[str], list[str]]:
    flags = ["--served-model-name", _name(plan.model)]
    # In SGLang the attention replicas of DP are inside the TP ranks.
    flags += ["--tp-size", str(pool.tp * pool.dp), "--pp-size", str(pool.pp)]
    if pool.dp > 1:
        flags += ["--dp-size", str(pool.dp), "--enable-dp-attention", "--ep-size", str(pool.tp * pool.dp)]
    weights, notes = _weights(engine.weight_dtype)
    flags += weights
    flags += ["--kv-cache-dtype", {"fp8": "fp8_e4m3"}.get(engine.kv_dtype, "auto")]
    flags += ["--page-size", str(engine.block_size)]
    flags += ["--max-running-requests", str(engine.max_num_seqs)]
    flags += ["--chunked-prefill-size", str(engine.max_num_batched_tokens if engine.chunked_prefill else -1)]
    flags += ["--mem-fraction-static", f"{engine.memory_share:g}"]
    if pool.kv_tokens is not None:
        flags += ["--max-total-tokens", str(pool.kv_tokens)]
    if not engine.prefix_caching:
        flags.append("--disable-radix-cache")
    if pool.role in KV_ROLES:
        flags += ["--disaggregation-mode", pool.role, "--disaggregation-transfer-backend", "nixl"]
        if pool.role == "prefill":
            flags += ["--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT)]
    return flags, notes


def _weights(dtype: str) -> tuple[list[str], list[str]]:
    if dtype in TORCH_DTYPES:
        return ["--dtype", TORCH_DTYPES[dtype]], []
    if dtype == "fp8":
        return ["--quantization", "fp8"], []
    return [], [f"$MODEL is a checkpoint with {dtype} weights"]


def _name(model: str) -> str:
    """The model's own name; a plan may hold the path of a config.json."""
    parts = model.rstrip("/").split("/")
    return parts[-2] if parts[-1].endswith(".json") and len(parts) > 1 else parts[-1]


def vllm_lines(plan: Plan, gpus_per_node: Mapping[str, int] | None = None) -> str:
    """A shell text: `vllm serve` for each pool, and hetkv as KV connector where prefill and decode are separate."""
    parts = [_head(plan)]
    if plan.disaggregated:
        parts[0] += "\nHOST=...  # on a prefill host: its address as the decode hosts reach it"
        parts[0] += f"\n# {SECRET}: 16 bytes or more, the same on every host, readable by its owner only"
    found = servers(plan, "vllm", gpus_per_node)
    for server in found:
        command = ["vllm", "serve", '"$MODEL"', *_quoted(server.arguments), "--host 0.0.0.0", f"--port {server.port}"]
        others = "--headless"
        if server.nodes > 1:
            # Rank 0 serves; the others take part in it and also have `--headless`.
            if server.dp > 1:  # whole replicas on every node
                local = server.dp // server.nodes
                command += [f"--data-parallel-size-local {local}", '--data-parallel-address "$HEAD"']
                command += [f"--data-parallel-rpc-port {RPC_PORT}"]
                others += f" --data-parallel-start-rank $((RANK * {local}))"
            else:
                command += [f"--nnodes {server.nodes}", '--node-rank "$RANK"', '--master-addr "$HEAD"']
        parts.append(_command(server, command, f"add {others} where RANK is not 0"))
    if plan.disaggregated:
        assert plan.link is not None
        mode = "concurrent" if plan.link.overlap == "layerwise" else "prefill_first"
        proxy = ["hetkv", "proxy", f"--mode {mode}", f"--port {ROUTER_PORT}"]
        for role in KV_ROLES:
            proxy += [f"--{role}", *_peers(found, role)]
        parts.append("# The proxy; hosts are named after pool and instance here.\n" + _join(proxy))
    return "\n\n".join(parts) + "\n"


def sglang_lines(plan: Plan, gpus_per_node: Mapping[str, int] | None = None) -> str:
    """A shell text: `sglang.launch_server` for each pool, and its router where prefill and decode are separate."""
    parts = [_head(plan)]
    found = servers(plan, "sglang", gpus_per_node)
    for server in found:
        command = ["python", "-m", "sglang.launch_server", '--model-path "$MODEL"', *_quoted(server.arguments)]
        command += ["--host 0.0.0.0", f"--port {server.port}"]
        if server.nodes > 1:
            command += [f"--nnodes {server.nodes}", '--node-rank "$RANK"', f'--dist-init-addr "$HEAD:{MASTER_PORT}"']
        parts.append(_command(server, command, ""))
    if plan.disaggregated:
        router = ["python", "-m", "sglang_router.launch_router", "--pd-disaggregation"]
        router += _peers(found, "prefill", "--prefill ", f" {BOOTSTRAP_PORT}")
        router += _peers(found, "decode", "--decode ")
        router += ["--host 0.0.0.0", f"--port {ROUTER_PORT}"]
        text = "# The router; hosts are named after pool and instance here. SGLang moves the KV itself, not by hetkv:"
        text += "\n# SGLang's documents say whether its back end joins these GPUs, page sizes and dtypes."
        parts.append(text + "\n" + _join(router))
    return "\n\n".join(parts) + "\n"


def _peers(found: list[Server], role: str, before: str = "", after: str = "") -> list[str]:
    """The address of each instance of a role; a loop of the shell where a pool has many."""
    words = []
    for server in found:
        each = f"{before}http://{server.pool}-%d:{server.port}{after}"
        if server.role != role:
            continue
        if server.count <= 4:
            words += [each % i for i in range(server.count)]
        else:
            words.append(f"$(for i in $(seq 0 {server.count - 1}); do printf -- ' {each}' $i; done)")
    return words


def _head(plan: Plan) -> str:
    if "/" in plan.model and not plan.model.endswith(".json"):
        return f"MODEL={shlex.quote(plan.model)}"
    return f"MODEL=...  # checkpoint of {_name(plan.model)}: a folder, or its name on the Hugging Face hub"


def _command(server: Server, command: list[str], ranks: str) -> str:
    where = f"{server.gpus} x {server.gpu}" if server.gpus > 1 else server.gpu
    lines = [f"# {server.pool}: {server.count} instance{'s' * (server.count > 1)} on {where} each"]
    if server.nodes > 1:
        lines[0] += f", {server.nodes} nodes an instance: RANK is the node's number, HEAD the address of node 0"
        lines[0] += f"; {ranks}" * bool(ranks)
    elif server.share > 1 and server.count > 1:
        last = "i" if server.gpus == 1 else f"{server.gpus}i to {server.gpus}i+{server.gpus - 1}"
        lines[0] += (
            f", {server.share} to a node: instance i of it on GPU{'s' * (server.gpus > 1)} {last}, port {server.port}+i"
        )
    lines += [f"# {note}" for note in server.notes]
    if server.nodes == 1 and server.share > 1:
        devices = ",".join(str(i) for i in range(server.gpus))
        command = [f"{visible_devices(server)}={devices}", *command]
    return "\n".join(lines) + "\n" + _join(command)


def visible_devices(server: Server) -> str:
    """The variable that says which GPUs a process sees."""
    if server.gpu.startswith("Gaudi"):
        return "HABANA_VISIBLE_DEVICES"
    return VISIBLE_DEVICES.get(server.vendor, "CUDA_VISIBLE_DEVICES")


def _quoted(arguments: list[str]) -> list[str]:
    """Flag and value as one word of a line."""
    words: list[str] = []
    for argument in arguments:
        if argument.startswith("--") or not words:
            words.append(argument)
        else:
            words[-1] += " " + shlex.quote(argument).replace(HOST, f"'\"{HOST}\"'")
    return words


def _join(words: list[str]) -> str:
    """A command broken into lines of at most 120 characters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > 116:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
