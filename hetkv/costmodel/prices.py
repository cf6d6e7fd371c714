"""Prices of GPUs: the user's input, with basis and date. hetkv ships none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hetkv.costmodel.catalogue import Catalogue
from hetkv.errors import InputError

BASES = ("on demand", "reserved", "rental cost model")


@dataclass(frozen=True)
class Price:
    """US dollars per GPU and hour, on what basis, as of which date."""

    usd_per_gpu_hour: float
    basis: str
    date: str


def load_prices(path: str | Path, catalogue: Catalogue) -> dict[str, Price]:
    """Read `prices: {GPU: {usd_per_gpu_hour, basis, date}}`; keys of the result are catalogue names."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not isinstance(document.get("prices"), dict):
        raise InputError(f"{path}: expected a mapping with `prices`")
    return {catalogue.gpu(str(name)).name: _price(raw, f"{path}: {name}") for name, raw in document["prices"].items()}


def _price(raw: Any, where: str) -> Price:
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected usd_per_gpu_hour, basis and date")
    for name in ("usd_per_gpu_hour", "basis", "date"):
        if name not in raw:
            raise InputError(f"{where}: missing field `{name}`")
    value = raw["usd_per_gpu_hour"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InputError(f"{where}: `usd_per_gpu_hour` must be a positive number, got {value!r}")
    if raw["basis"] not in BASES:
        raise InputError(f"{where}: `basis` is {raw['basis']!r}; known are {', '.join(BASES)}")
    return Price(float(value), str(raw["basis"]), str(raw["date"]))


def prices_of(gpus: Iterable[str], prices: dict[str, Price], mix_bases: bool = False) -> dict[str, Price]:
    """The prices of `gpus`. A missing one is an error, and so are different bases unless `mix_bases` allows them."""
    found: dict[str, Price] = {}
    for gpu in gpus:
        if gpu not in prices:
            raise InputError(f"no price for GPU {gpu}; prices are given for {', '.join(prices) or 'none'}")
        found[gpu] = prices[gpu]
    bases = {price.basis: gpu for gpu, price in found.items()}
    if len(bases) > 1 and not mix_bases:
        named = ", ".join(f"{gpu}: {basis}" for basis, gpu in bases.items())
        raise InputError(f"prices of different bases in one plan ({named}); ask for it to allow that")
    return found
