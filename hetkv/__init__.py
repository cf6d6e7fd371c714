"""hetkv moves the KV cache of large language models between GPUs that do not match.

The names below are imported when they are first used, so that `import hetkv` loads neither UCX nor PyTorch: the cost
model and the simulator work without them.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from hetkv._version import __version__

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library does not print

_MODULES = {
    "DType": "kv.dtypes",
    "Exchange": "transport.exchange",
    "HetkvError": "errors",
    "Instance": "transport.instance",
    "Interval": "kv.spec",
    "KVLayout": "kv.layout",
    "KVPool": "kv.pool",
    "KVSpec": "kv.spec",
    "LayerMemory": "kv.layer",
    "LayerSpec": "kv.spec",
    "Memory": "kv.memory",
    "NodeCollector": "transport.telemetry",
    "Receiver": "transport.receiver",
    "RecvHandle": "transport.receiver",
    "ScaleLayout": "kv.scale",
    "SecretFile": "control.secret",
    "Segment": "kv.spec",
    "SendHandle": "transport.sender",
    "Sender": "transport.sender",
    "Shard": "kv.spec",
    "TlsConfig": "control.tls",
    "TransferConfig": "transport.config",
    "content_digest": "transport.content",
}

__all__ = [
    "DType",
    "Exchange",
    "HetkvError",
    "Instance",
    "Interval",
    "KVLayout",
    "KVPool",
    "KVSpec",
    "LayerMemory",
    "LayerSpec",
    "Memory",
    "NodeCollector",
    "Receiver",
    "RecvHandle",
    "ScaleLayout",
    "SecretFile",
    "Segment",
    "SendHandle",
    "Sender",
    "Shard",
    "TlsConfig",
    "TransferConfig",
    "__version__",
    "content_digest",
]

if TYPE_CHECKING:
    from hetkv.control.secret import SecretFile
    from hetkv.control.tls import TlsConfig
    from hetkv.errors import HetkvError
    from hetkv.kv.dtypes import DType
    from hetkv.kv.layer import LayerMemory
    from hetkv.kv.layout import KVLayout
    from hetkv.kv.memory import Memory
    from hetkv.kv.pool import KVPool
    from hetkv.kv.scale import ScaleLayout
    from hetkv.kv.spec import Interval, KVSpec, LayerSpec, Segment, Shard
    from hetkv.transport.config import TransferConfig
    from hetkv.transport.content import content_digest
    from hetkv.transport.exchange import Exchange
    from hetkv.transport.instance import Instance
    from hetkv.transport.receiver import Receiver, RecvHandle
    from hetkv.transport.sender import Sender, SendHandle
    from hetkv.transport.telemetry import NodeCollector


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'hetkv' has no attribute {name!r}")
    return getattr(import_module(f"hetkv.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
