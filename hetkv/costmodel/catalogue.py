"""The GPU catalogue: figures with source and confidence, from `data/gpus.yaml` and the user's own YAML files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hetkv.costmodel.textfile import load_yaml, read_utf8
from hetkv.errors import InputError

UNITS = {
    "bf16_tflops": "dense TFLOP/s",
    "fp8_tflops": "dense TFLOP/s",
    "fp4_tflops": "dense TFLOP/s",
    "int8_tops": "dense TOP/s",
    "memory_gib": "GiB",
    "memory_tb_s": "TB/s",
    "pair_gb_s": "GB/s, one direction, one GPU pair",
    "gpu_gb_s": "GB/s, one direction, one GPU to all others",
    "gpus_per_node": "GPUs",
    "nic_gbit_s": "Gbit/s per GPU",
    "host_speed": "single-thread speed relative to Sapphire Rapids",
}
TOPOLOGIES = ("switch", "mesh", "host")
VENDORS = {"nvidia": "NVIDIA", "amd": "AMD", "intel": "Intel", "huawei": "Huawei"}  # for people
DTYPE_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5625, "fp4": 0.53125}
"""Bytes per weight or KV element, scales of a group included (int4: 16-bit scale per 32; fp4: 8-bit scale per 32)."""


@dataclass(frozen=True)
class Figure:
    """One catalogue number with where it comes from and how far to trust it."""

    value: float
    source: str
    confidence: str


@dataclass(frozen=True)
class Gpu:
    """One accelerator. Figures are read by name; a missing one is an `InputError` that names GPU and figure."""

    name: str
    vendor: str
    topology: str
    figures: Mapping[str, Figure]
    aliases: tuple[str, ...] = ()

    def figure(self, name: str) -> Figure:
        if name not in UNITS:
            raise InputError(f"unknown figure {name!r}; known are {', '.join(UNITS)}")
        found = self.figures.get(name)
        if found is None:
            raise InputError(
                f"GPU {self.name}: figure `{name}` ({UNITS[name]}) is missing; give it in a catalogue file of your own"
            )
        return found

    def value(self, name: str) -> float:
        return self.figure(name).value

    @property
    def memory_bytes(self) -> float:
        return self.value("memory_gib") * 2**30

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second."""
        return self.value("memory_tb_s") * 1e12

    def flops(self, dtype: str) -> float:
        """Dense operations per second of matrix products whose weights are held as `dtype`.

        Where the GPU has no unit for the dtype, weights are widened on load and the bf16 unit does the work.
        """
        if dtype not in DTYPE_BYTES:
            raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
        name = {"fp8": "fp8_tflops", "fp4": "fp4_tflops", "int8": "int8_tops"}.get(dtype, "bf16_tflops")
        return self.value(name if name in self.figures else "bf16_tflops") * 1e12

    def link_bandwidth(self, peers: int) -> float:
        """Bytes per second, one direction, that one GPU sends when it talks to `peers` others of its node at once."""
        if self.topology == "switch":
            return self.value("gpu_gb_s") * 1e9
        return min(self.value("pair_gb_s") * peers, self.value("gpu_gb_s")) * 1e9


@dataclass
class Catalogue:
    """GPUs by name and alias, without regard to case, blanks, `-`, `_` and the vendor's name in front."""

    gpus: dict[str, Gpu] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names: dict[str, str] = {}
        for gpu in self.gpus.values():
            for name in (gpu.name, *gpu.aliases):
                self._names[_key(name)] = gpu.name

    def gpu(self, name: str) -> Gpu:
        found = self._names.get(_key(name))
        if found is None:
            raise InputError(f"unknown GPU {name!r}; known are {', '.join(self.gpus)}")
        return self.gpus[found]


VENDOR_WORDS = ("nvidia", "geforce", "amd", "instinct", "radeon", "intel", "habana")


def _key(name: str) -> str:
    """Letters and digits; names as drivers report them start with the vendor's words."""
    key = "".join(c for c in name.lower() if c.isalnum())
    for word in VENDOR_WORDS:
        key = key.removeprefix(word)
    return key


def load_catalogue(overrides: Iterable[str | Path] = ()) -> Catalogue:
    """The shipped catalogue with the user's YAML files laid over it, later ones last.

    A user's file has the shape of `data/gpus.yaml`; it may name new GPUs or single figures of known ones, and a figure
    may be a bare number (source: the file).
    """
    gpus = dict(_shipped().gpus)
    for path in overrides:
        for gpu in _parse(read_utf8(path), str(path), gpus):
            gpus[gpu.name] = gpu
    return Catalogue(gpus)


@lru_cache(maxsize=1)
def _shipped() -> Catalogue:
    entry = resources.files("hetkv.costmodel") / "data" / "gpus.yaml"
    gpus = _parse(entry.read_text(encoding="utf-8"), "hetkv/costmodel/data/gpus.yaml", {})
    return Catalogue({gpu.name: gpu for gpu in gpus})


def _parse(text: str, origin: str, known: Mapping[str, Gpu]) -> list[Gpu]:
    try:
        document = load_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{origin}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("gpus"), dict):
        raise InputError(f"{origin}: expected a mapping with `gpus`")
    sources = document.get("sources") or {}
    names = Catalogue(dict(known))
    return [_gpu(str(name), entry, origin, sources, names) for name, entry in document["gpus"].items()]


def _gpu(name: str, entry: Any, origin: str, sources: Mapping[str, str], known: Catalogue) -> Gpu:
    where = f"{origin}: GPU {name}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected a mapping")
    base = known.gpus.get(known._names.get(_key(name), ""))
    unknown = set(entry) - {"vendor", "aliases", "figures"}
    if unknown:
        raise InputError(f"{where}: unknown field `{sorted(unknown)[0]}`; known are vendor, aliases, figures")
    figures = dict(base.figures) if base else {}
    topology = base.topology if base else ""
    for key, raw in (entry.get("figures") or {}).items():
        parts = raw if isinstance(raw, list) else [raw]
        value, source, confidence = (*parts, *[None] * (3 - len(parts)))[:3]
        if key == "topology":
            if value not in TOPOLOGIES:
                raise InputError(f"{where}: `topology` is {value!r}; known are {', '.join(TOPOLOGIES)}")
            topology = str(value)
            continue
        if key not in UNITS:
            raise InputError(f"{where}: unknown figure `{key}`; known are topology, {', '.join(UNITS)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise InputError(f"{where}: `{key}` must be a positive number ({UNITS[key]}), got {value!r}")
        figures[key] = Figure(float(value), sources.get(source, source or origin), confidence or "user's figure")
    vendor = entry.get("vendor") or (base.vendor if base else None)
    if not vendor:
        raise InputError(f"{where}: missing field `vendor`")
    if not topology:
        raise InputError(f"{where}: figure `topology` ({', '.join(TOPOLOGIES)}) is missing")
    aliases = tuple(str(a) for a in entry.get("aliases") or (base.aliases if base else ()))
    return Gpu(base.name if base else name, str(vendor), topology, figures, aliases)
