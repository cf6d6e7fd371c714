"""What serving engines can run, by engine, version and feature: the one table of it.

The planner offers what this table allows, the launch lines say where it does not, and the connector checks itself by
it. Imports no engine.
"""

from __future__ import annotations

from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

ANY = 1_000_000

CONNECTOR_VLLM = ">=0.32,<0.33"
"""What the tests of `tests/vllm` ran hetkv's connector with. A newer minor may work, but was not tried."""


class Way(NamedTuple):
    """One way of running an engine, and the most that it can start.

    `versions` is a specifier as pip reads it. `kv_dtypes` are this project's names; `latent` is MLA; `dp` are attention
    replicas that share the experts of one model (expert parallelism over `tp * dp` ranks), `whole`: on several nodes,
    each has whole ones; `state` are layers that keep a state in place of KV (Mamba and the like). `transfer` names what
    moves the KV; empty: nothing has to.
    """

    engine: str
    versions: str
    transfer: str
    weight_dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    tp: int = ANY
    pp: int = ANY
    dp: int = ANY
    latent: bool = True
    state: bool = True
    whole: bool = False


WEIGHTS = ("bf16", "fp16", "fp8", "int8", "int4", "fp4")
KV = ("bf16", "fp16", "fp8")

VLLM = Way("vllm", ">=0.9", "", WEIGHTS, KV, whole=True)
VLLM_WITHOUT_EXPERTS = Way("vllm", ">=0.6,<0.9", "", WEIGHTS, KV, dp=1)
"""Versions that have not all flags of the launch lines of `dp`."""
VLLM_CONNECTOR = Way("vllm", CONNECTOR_VLLM, "HetKVConnector", WEIGHTS, KV, pp=1, dp=1, state=False)
SGLANG = Way("sglang", ">=0.5", "", WEIGHTS, KV)
SGLANG_NIXL = Way("sglang", ">=0.5", "SGLang's NIXL back end", WEIGHTS, KV)

TABLE = (VLLM, VLLM_WITHOUT_EXPERTS, VLLM_CONNECTOR, SGLANG, SGLANG_NIXL)

ENGINES = tuple(dict.fromkeys(way.engine for way in TABLE))
"""Engines that the planner can write launch lines for."""


class Use(NamedTuple):
    """How an instance would run. `version` None: one that the table allows. `moe`: the model has routed experts."""

    engine: str
    version: str | None = None
    weight_dtype: str = "bf16"
    kv_dtype: str = "bf16"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    latent: bool = False
    state: bool = False
    moe: bool = False
    disaggregated: bool = False
    node: int = ANY
    """GPUs of a node."""


def obstacle(use: Use) -> str:
    """Why the instance cannot be started, in a few words; empty where it can."""
    ways = [w for w in TABLE if w.engine == use.engine and bool(w.transfer) == use.disaggregated]
    if not ways:
        return f"no launch line is known for engine {use.engine!r} (known: {', '.join(ENGINES)})"
    named = [w for w in ways if use.version is None or _within(use.version, w.versions)]
    reasons = [_against(way, use) for way in named or ways]
    return "" if "" in reasons else reasons[0]


def _against(way: Way, use: Use) -> str:
    name = way.transfer or way.engine
    if use.version is not None and not _within(use.version, way.versions):
        return f"{name} takes {way.engine} {way.versions}, not {use.version}"
    for field in ("tp", "pp", "dp"):
        size, most = getattr(use, field), getattr(way, field)
        if size > most:
            return f"{name} takes {field} {most} at most, not {size}"
    if use.dp > 1 and not use.moe:
        return f"dp {use.dp} shares the experts of one model, and this model has none"
    replica = use.tp * use.pp
    if way.whole and use.dp > 1 and replica * use.dp > use.node and (use.node % replica or replica * use.dp % use.node):
        return f"{name} has whole replicas on every node: {use.dp} of {replica} GPUs do not fill nodes of {use.node}"
    for field in ("weight_dtype", "kv_dtype"):
        dtype, known = getattr(use, field), getattr(way, f"{field}s")
        if dtype not in known:
            return f"{name} takes the {field} {', '.join(known)}, not {dtype}"
    if use.latent and not way.latent:
        return f"{name} does not take an MLA cache"
    if use.state and not way.state:
        return f"{name} does not take the states of a hybrid model"
    return ""


def _within(version: str, specifier: str) -> bool:
    """Whether a version is in a range. What is no version (`unrecorded`, a year) says nothing against it."""
    try:
        found = Version(version)
    except InvalidVersion:
        return True
    return found.major > 1000 or SpecifierSet(specifier).contains(found, prereleases=True)
