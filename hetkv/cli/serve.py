"""`hetkv serve`: a scheduler, an OpenAI-compatible server, and instances that prefill and decode."""

from __future__ import annotations

import argparse
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetkv import terminal
from hetkv.cli import tls_options
from hetkv.errors import InputError

if TYPE_CHECKING:
    from hetkv.serve.http import HttpOptions
    from hetkv.serve.instance import InstanceConfig
    from hetkv.serve.plans import Deployment
    from hetkv.serve.ray_cluster import RayInstances
    from hetkv.serve.server import Server, ServerOptions

API_KEYS_ENV = "HETKV_API_KEYS"
DEMO = Path(__file__).parents[1] / "runtime" / "data" / "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hetkv serve`."""
    parser.add_argument(
        "--model",
        default=str(DEMO),
        metavar="DIR",
        help="checkpoint directory, or shape:NAME for random weights (default: the demo's)",
    )
    parser.add_argument("--served-name", metavar="NAME", help="model name of the API (default: the directory's name)")
    what = parser.add_argument_group("instances")
    what.add_argument("--plan", metavar="FILE", help="a plan.yaml, such as `hetkv plan` writes")
    what.add_argument(
        "--engine",
        choices=("hetkv", "vllm"),
        help="of the plan's instances: the reference runtime, or vLLM with hetkv's connector (default: the plan's)",
    )
    what.add_argument("--vllm-args", default="", metavar="ARGS", help="further arguments of every vLLM server")
    what.add_argument("--prefill", metavar="NxTPaPPb", help="instances that prefill (default TP1)")
    what.add_argument("--decode", metavar="NxTPaPPb", help="instances that decode (default TP1)")
    what.add_argument("--aggregated", metavar="NxTPaPPb", help="instances that do both, in place of these")
    what.add_argument(
        "--cluster", choices=("local", "ray"), default="local", help="where they run: processes here, or actors of Ray"
    )
    what.add_argument(
        "--ray-address",
        default="auto",
        metavar="ADDRESS",
        help="of the cluster (default: the one that this node is in)",
    )
    what.add_argument("--none", action="store_true", help="start no instance: they join from elsewhere")
    what.add_argument("--join", metavar="HOST:PORT", help="start no server: join the one whose gate is there")
    for role, block, layout in (("prefill", 16, "nhd"), ("decode", 64, "hnd")):
        what.add_argument(
            f"--{role}-block", type=int, default=block, metavar="N", help=f"tokens of a KV block (default {block})"
        )
        what.add_argument(f"--{role}-layout", default=layout, metavar="NAME", help=f"of KV (default {layout})")
        what.add_argument(f"--{role}-dtype", metavar="DTYPE", help="of KV (default: the compute dtype)")
        what.add_argument(
            f"--{role}-device",
            default="auto",
            metavar="DEVICE",
            help="cpu, or cuda:N of the first rank (default: GPUs in turn where there are some)",
        )
    what.add_argument("--compute-dtype", metavar="DTYPE", help="default: bfloat16 on GPUs, float32 on CPU")
    what.add_argument("--kv-tokens", type=int, metavar="N", help="KV tokens of an instance (default: what fits)")
    what.add_argument(
        "--memory-share", type=float, default=0.9, metavar="X", help="part of a GPU's memory to use (default 0.9)"
    )
    what.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="sequences of a step (default 256)")
    what.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="tokens of a step (default 2048)"
    )
    what.add_argument("--no-prefix-caching", action="store_true", help="compute and send every prompt whole")
    what.add_argument("--threads", type=int, default=1, metavar="N", help="compute threads of a rank (default 1)")
    what.add_argument(
        "--instance-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address of this machine as other instances reach it (default 127.0.0.1)",
    )
    what.add_argument(
        "--steps", metavar="DIR", help="write what each step computed and how long it took, for `hetkv calibrate`"
    )
    routing = parser.add_argument_group("routing, by the simulator's disciplines (docs/simulator.md)")
    for role in ("prefill", "decode"):
        routing.add_argument(f"--{role}-routing", metavar="NAME", help="default balanced, or the plan's")
    http = parser.add_argument_group("server")
    http.add_argument("--host", default="127.0.0.1")
    http.add_argument("--port", type=int, default=8000)
    http.add_argument(
        "--gate",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where instances register (default: a free port of this machine alone)",
    )
    http.add_argument("--secret-file", metavar="FILE", help="shared with instances on other machines, mode 600")
    over = "between the scheduler and instances, and for KV between instances"
    tls_options.add_arguments(http, over, "of this machine's scheduler and instances")
    http.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"clients must send one of these (repeat; or ${API_KEYS_ENV}, separated by commas)",
    )
    http.add_argument(
        "--timeline",
        action="store_true",
        help="instances report what their transports do: shown at /ui, layer by layer",
    )
    http.add_argument(
        "--trace", metavar="FILE", help="write spans of all requests for Perfetto (OpenTelemetry; implies --timeline)"
    )
    http.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="default 8 MiB")
    http.add_argument(
        "--max-requests", type=int, default=512, metavar="N", help="at a time; more are answered with 429 (default 512)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 where all accepted requests were answered."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("hetkv.transport").setLevel(logging.WARNING)
    if args.none and args.join:
        raise InputError("--none and --join: nothing would be started")
    if args.cluster == "ray" and (args.none or args.join or _engine(args) == "vllm"):
        raise InputError("--cluster ray starts instances of the reference runtime: without --none, --join and vLLM")
    if args.join:
        return _join(args)
    return _serve_vllm(args) if _engine(args) == "vllm" else _serve(args)


def _engine(args: argparse.Namespace) -> str:
    """What the instances run."""
    if args.plan is None:
        if args.engine == "vllm":
            raise InputError("--engine vllm goes with --plan; `hetkv proxy` is for servers that run already")
        return "hetkv"
    from hetkv.simulator.deployment import load_plan

    name = str(args.engine or load_plan(args.plan).engine.name)
    if name not in ("hetkv", "vllm"):
        raise InputError(
            f"{args.plan}: engine {name!r}: `hetkv serve` starts vllm, or the reference runtime with --engine hetkv"
        )
    return name


def _serve_vllm(args: argparse.Namespace) -> int:
    """vLLM servers as the plan says, with the same front before them."""
    import asyncio
    import shlex

    from hetkv.serve.app import application
    from hetkv.serve.http import HttpServer, bound
    from hetkv.serve.vllm import VllmEngines
    from hetkv.serve.vllm_local import VllmLocal
    from hetkv.simulator.deployment import load_plan

    plan = load_plan(args.plan)
    listening = bound(args.host, args.port)
    local = VllmLocal(plan, args.model, args.secret_file, shlex.split(args.vllm_args), tls_options.tls_config(args))
    mode = "concurrent" if plan.link is not None and plan.link.overlap == "layerwise" else "prefill_first"

    async def serve() -> None:
        prefill, decode = local.urls("prefill"), local.urls("decode", "aggregated")
        routing = args.prefill_routing or plan.routing.prefill, args.decode_routing or plan.routing.decode
        engines = VllmEngines(prefill, decode, mode, 600.0, *routing)
        await engines.introduce()
        try:
            print(f"http://{args.host}:{listening.getsockname()[1]}/v1 serves {plan.model}", flush=True)
            await HttpServer(application(engines), _http_options(args)).serve([listening])
        finally:
            await engines.close()

    try:
        local.wait()
        asyncio.run(serve())
    finally:
        local.close()
    return 0


def _http_options(args: argparse.Namespace) -> HttpOptions:
    from hetkv.serve.http import HttpOptions

    keys = [key.strip() for key in os.environ.get(API_KEYS_ENV, "").split(",") if key.strip()]
    return HttpOptions(api_keys=(*args.api_key, *keys), max_body=args.max_body, max_requests=args.max_requests)


def _serve(args: argparse.Namespace) -> int:
    import msgspec

    from hetkv.serve.http import bound
    from hetkv.serve.local import Local
    from hetkv.serve.server import Server, run_server
    from hetkv.simulator.router import DISCIPLINES

    deployment = _deployment(args)
    for role in ("prefill", "decode"):
        name = getattr(args, f"{role}_routing")
        if name is not None and name not in DISCIPLINES:
            raise InputError(f"--{role}-routing {name}: known are {', '.join(DISCIPLINES)}")
    listening = bound(args.host, args.port)
    options = _server_options(args, deployment)
    local: Local | RayInstances = Local(deployment.instances)
    if args.cluster == "ray":
        from hetkv.control.secret import shared_secret
        from hetkv.serve.ray_cluster import RayInstances

        local = RayInstances(deployment.instances, args.ray_address, shared_secret(args.secret_file))
        options = msgspec.structs.replace(options, gate=options.gate.replace("127.0.0.1", local.host))
    server = Server(options, local.start)
    port = listening.getsockname()[1]
    threading.Thread(target=_announce, args=(server, local, f"http://{args.host}:{port}"), daemon=True).start()
    try:
        run_server(server, listening)
    finally:
        local.close()
    if local.failed:
        raise InputError(local.failed)
    return 0


def _announce(server: Server, local: Any, url: str) -> None:
    """Body of a thread: say when requests are answered; end the server where that will never be."""
    console = terminal.console()
    begin = time.monotonic()

    def up() -> bool:
        members = list(server.scheduler.members.values())
        return server.started and len(members) >= local.count and all(member.up for member in members)

    while not (up() or local.failed):
        time.sleep(0.05)
    for member in list(server.scheduler.members.values()):
        room = member.kv.total * member.kv.block_size
        console.print(f"{member.name}: {member.role} on {member.hello.device}, {member.hello.kv}, {room} tokens")
    if not local.failed:
        console.print(f"ready after {time.monotonic() - begin:.1f} s; instances join at {server.gate.address}")
        console.print(f"{url}/v1 serves {server.options.served_name!r}")
    while not local.failed:
        time.sleep(0.2)
    server.end()


def _join(args: argparse.Namespace) -> int:
    """One instance that joins a server elsewhere."""
    import msgspec

    from hetkv.serve.instance import run as run_instance

    deployment = _deployment(args)
    if len(deployment.instances) != 1:
        raise InputError("--join starts one instance: give one of --prefill, --decode, --aggregated")
    name = f"{deployment.instances[0].plan.name}@{args.instance_host}"
    config = msgspec.structs.replace(
        deployment.instances[0],
        plan=msgspec.structs.replace(deployment.instances[0].plan, name=name),
        scheduler=args.join,
    )
    return run_instance(config)


def _deployment(args: argparse.Namespace) -> Deployment:
    """What the options or the plan say."""
    import msgspec

    from hetkv.runtime.plan import InstancePlan, SideOptions, parse_side
    from hetkv.serve.plans import Deployment, checked, of_plan

    base = _base(args)
    named = {role: getattr(args, role) for role in ("prefill", "decode", "aggregated")}
    if args.plan is not None:
        if any(named.values()) or args.none or args.join:
            raise InputError("--plan says which instances there are: leave out the options that do")
        return of_plan(args.plan, args.model, base)
    if args.none:
        return Deployment([])
    if not args.join and (named["prefill"] or named["decode"] or not named["aggregated"]):
        named = {**named, "prefill": named["prefill"] or "TP1", "decode": named["decode"] or "TP1"}
    found = []
    for role, text in named.items():
        if not text:
            continue
        side = "decode" if role == "aggregated" else role
        pool = SideOptions(
            block_size=getattr(args, f"{side}_block"),
            layout=getattr(args, f"{side}_layout"),
            dtype=getattr(args, f"{side}_dtype") or base.compute_dtype,
        )
        for plan in parse_side(text, role, pool):
            placed: InstancePlan = msgspec.structs.replace(plan, device=getattr(args, f"{side}_device"))
            found.append(msgspec.structs.replace(base, plan=placed, pool=role))
    return Deployment(checked(found, args.model))


def _base(args: argparse.Namespace) -> InstanceConfig:
    """What all instances have in common."""
    import torch

    from hetkv.runtime.batching import Limits
    from hetkv.runtime.plan import InstancePlan, SideOptions
    from hetkv.serve.instance import InstanceConfig, is_shape

    for name in ("kv_tokens", "max_num_seqs", "max_num_batched_tokens", "threads", "max_body", "max_requests"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.max_num_seqs >= args.max_num_batched_tokens:
        raise InputError(
            f"--max-num-batched-tokens {args.max_num_batched_tokens} leaves no room for prompts in addition to "
            f"--max-num-seqs {args.max_num_seqs}"
        )
    if not 0 < args.memory_share <= 1:
        raise InputError(f"--memory-share must be between 0 and 1, not {args.memory_share}")
    dtype = args.compute_dtype or ("bfloat16" if torch.cuda.device_count() else "float32")
    return InstanceConfig(
        plan=InstancePlan(name="", role="prefill", pool=SideOptions(block_size=16, layout="nhd", dtype=dtype)),
        model=args.model if is_shape(args.model) else str(Path(args.model).absolute()),
        scheduler="",
        limits=Limits(args.max_num_seqs, args.max_num_batched_tokens),
        kv_tokens=args.kv_tokens,
        memory_share=args.memory_share,
        unit=int(not args.no_prefix_caching),
        compute_dtype=dtype,
        threads=args.threads,
        host=args.instance_host,
        trace=_timeline(args),
        secret_file=args.secret_file,
        steps=args.steps,
        tls=tls_options.tls_config(args),
    )


def _server_options(args: argparse.Namespace, deployment: Deployment) -> ServerOptions:
    from hetkv.serve.server import ServerOptions

    return ServerOptions(
        model=args.model,
        served_name=args.served_name or args.model.removeprefix("shape:").rstrip("/").split("/")[-1],
        gate=args.gate,
        http=_http_options(args),
        prefill=args.prefill_routing or deployment.prefill,
        decode=args.decode_routing or deployment.decode,
        secret_file=args.secret_file,
        tls=tls_options.tls_config(args),
        timeline=_timeline(args),
        trace=args.trace,
    )


def _timeline(args: argparse.Namespace) -> bool:
    return bool(args.timeline or args.trace is not None)
