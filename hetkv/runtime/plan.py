"""Which instances a demo runs: `InstancePlan`, from the options' `2xTP2PP2` or from a `plan.yaml`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.presets import PRESETS
from hetkv.kv.spec import Shard
from hetkv.models import ModelConfig
from hetkv.runtime.part import Part

if TYPE_CHECKING:
    import torch

GRAMMAR = "[Nx]TPa[PPb[:l+l+...]]"
MAX_RANKS = 64
"""Rank processes of one demo: a typing error must not fill the machine."""
LAYOUTS = [name for name in PRESETS if name not in ("latent", "fp8_ds_mla", "state")]
_SHAPE = re.compile(r"(?:(\d+)x)?tp(\d+)(?:pp(\d+)(?::(\d+(?:\+\d+)*))?)?", re.IGNORECASE)


class SideOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One instance's pools."""

    block_size: int
    layout: str
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.dtype} block {self.block_size} {self.layout}"


PREFILL_POOL = SideOptions(block_size=16, layout="nhd")
DECODE_POOL = SideOptions(block_size=64, layout="rocm")
"""Different in block size and layout: what the demo converts by default."""


class InstancePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One instance: `tp * pp` ranks with a pool each."""

    name: str
    role: str
    """`prefill` or `decode`."""
    pool: SideOptions
    tp: int = 1
    pp: int = 1
    stages: tuple[int, ...] | None = None
    """Layers of each pipeline stage; `None`: as even as can be."""
    device: str = "cpu"
    """`cpu`, or `cuda:N` (also for HIP) of the first rank; the others take the GPUs after it."""

    def rank_device(self, rank: int) -> torch.device:
        """Where a rank computes and keeps its pool. `InputError` for a device that is not there."""
        import torch

        try:
            first = torch.device(self.device)
        except RuntimeError:
            raise InputError(f"{self.name}: device {self.device!r}: cpu or cuda:N") from None
        if first.type == "cpu":
            return first
        index = (first.index or 0) + rank
        if first.type != "cuda" or index >= torch.cuda.device_count():
            raise InputError(
                f"{self.name}: rank {rank} of {self.device} is not there: PyTorch sees {torch.cuda.device_count()} GPUs"
            )
        return torch.device("cuda", index)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def parts(self, config: ModelConfig) -> list[Part]:
        """What each rank computes. `InputError` names the instance if the model cannot be split so."""
        try:
            places = [(stage, rank) for stage in range(self.pp) for rank in range(self.tp)]
            return [Part.of(config, self.tp, rank, self.pp, stage, self.stages) for stage, rank in places]
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None

    def shards(self, config: ModelConfig) -> list[Shard]:
        """KV of each rank, in the order of ranks."""
        return [part.shard for part in self.parts(config)]

    def __str__(self) -> str:
        return f"TP{self.tp}" + (f"PP{self.pp}" if self.pp > 1 else "")


def parse_side(text: str, role: str, pool: SideOptions) -> list[InstancePlan]:
    """Instances of `GRAMMAR`: `2xTP2` is two of two ranks, `TP1PP2:4+2` one of two stages with 4 and 2 layers."""
    match = _SHAPE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise InputError(f"--{role} {text}: not of the form {GRAMMAR}, such as 2xTP2 or TP1PP2")
    count, tp, pp = (int(number or 1) for number in match.groups()[:3])
    for name, value in (("instances", count), ("TP", tp), ("PP", pp)):
        if value < 1:
            raise InputError(f"--{role} {text}: {name} must be at least 1, not {value}")
    stages = None if match[4] is None else tuple(map(int, match[4].split("+")))
    _check_ranks(count * tp * pp, f"--{role} {text}")
    return [
        InstancePlan(name=f"{role}-{index}", role=role, tp=tp, pp=pp, stages=stages, pool=pool)
        for index in range(count)
    ]


def read_plan(path: str | Path, prefill: SideOptions, decode: SideOptions) -> list[InstancePlan]:
    """Instances of a `plan.yaml` (docs/simulator.md): its roles, counts, TP, PP, block sizes, KV dtypes and layouts.

    `prefill` and `decode` say the layout where the plan leaves it open. GPUs, links and prices do not matter here.
    """
    try:
        from hetkv.simulator.deployment import engine_of, load_plan
    except ModuleNotFoundError as error:
        raise InputError(f"--plan needs {error.name}: pip install 'hetkv[plan]'") from None
    plan = load_plan(path)
    made = []
    for pool in plan.pools:
        where = f"{path}: pool {pool.name}"
        if pool.role == "aggregated":
            raise InputError(f"{where}: role aggregated moves no KV; the demo needs prefill and decode")
        if pool.dp > 1:
            raise InputError(f"{where}: `dp` {pool.dp}: the demo runs tensor and pipeline parallelism; use `count`")
        _check_ranks(pool.count * pool.gpus, where)
        engine = engine_of(plan, pool, str(path))
        layout = pool.layout or (prefill if pool.role == "prefill" else decode).layout
        if layout not in LAYOUTS:
            raise InputError(f"{where}: `layout` {layout!r} is not known; known are {', '.join(LAYOUTS)}")
        try:
            dtype = DType.parse(engine.kv_dtype)
        except InputError as error:
            raise InputError(f"{where}: `kv_dtype`: {error}") from None
        side = SideOptions(block_size=engine.block_size, layout=layout, dtype=dtype.value)
        made += [
            InstancePlan(
                name=f"{pool.name}-{index}",
                role=pool.role,
                tp=pool.tp,
                pp=pool.pp,
                stages=None if pool.stages is None else tuple(pool.stages),
                pool=side,
            )
            for index in range(pool.count)
        ]
    return made


def check_instances(instances: Sequence[InstancePlan], config: ModelConfig) -> None:
    """Everything that would otherwise fail somewhere inside a rank. `InputError`."""
    _check_ranks(sum(instance.ranks for instance in instances), "the deployment")
    for instance in instances:
        if instance.pool.block_size < 1:
            raise InputError(f"{instance.name}: block size {instance.pool.block_size} must be at least 1")
        if DType.parse(instance.pool.dtype) in (DType.INT8, DType.UINT8):
            raise InputError(f"{instance.name}: the runtime does not compute with {instance.pool.dtype} KV")
        instance.parts(config)


def _check_ranks(count: int, where: str) -> None:
    if count > MAX_RANKS:
        raise InputError(f"{where}: {count} ranks, the demo starts at most {MAX_RANKS} processes")
