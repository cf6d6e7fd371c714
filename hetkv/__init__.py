"""hetkv moves the KV cache of large language models between GPUs that do not match.

The names below are imported when they are first used, so that `import hetkv` loads neither UCX nor PyTorch: the cost
model and the simulator work without them.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library does not print

_HOME = {
    "DType": "dtypes",
    "Exchange": "exchange",
    "KVLayout": "layout",
    "KVPool": "pool",
    "KVSpec": "spec",
    "LayerSpec": "spec",
    "Receiver": "transfer",
    "Reception": "transfer",
    "ScaleLayout": "scale",
    "Sender": "transfer",
    "Shard": "spec",
    "TransferConfig": "config",
    "Transmission": "transfer",
}

__all__ = [
    "DType",
    "Exchange",
    "KVLayout",
    "KVPool",
    "KVSpec",
    "LayerSpec",
    "Receiver",
    "Reception",
    "ScaleLayout",
    "Sender",
    "Shard",
    "TransferConfig",
    "Transmission",
]

if TYPE_CHECKING:
    from hetkv.config import TransferConfig
    from hetkv.dtypes import DType
    from hetkv.exchange import Exchange
    from hetkv.layout import KVLayout
    from hetkv.pool import KVPool
    from hetkv.scale import ScaleLayout
    from hetkv.spec import KVSpec, LayerSpec, Shard
    from hetkv.transfer import Receiver, Reception, Sender, Transmission


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'hetkv' has no attribute {name!r}")
    return getattr(import_module(f"hetkv.{_HOME[name]}"), name)
