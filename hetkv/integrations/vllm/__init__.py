"""The KV connector of vLLM: name this module as `kv_connector_module_path` and `HetKVConnector` as `kv_connector`.

`docs/vllm.md` says how. May import `hetkv.transport` and vLLM, which is imported, and its version checked, when
`HetKVConnector` is first asked for: the rest of hetkv runs without it.
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING

__all__ = ["HetKVConnector"]

if TYPE_CHECKING:
    from hetkv.integrations.vllm.connector import HetKVConnector


def __getattr__(name: str) -> object:
    if name != "HetKVConnector":
        raise AttributeError(f"module 'hetkv.integrations.vllm' has no attribute {name!r}")
    from hetkv.integrations.vllm.version import check_version

    check_version()
    from hetkv.integrations.vllm.preflight import check_command_line

    if multiprocessing.parent_process() is None:
        check_command_line(sys.argv)
    from hetkv.integrations.vllm.connector import HetKVConnector

    return HetKVConnector
