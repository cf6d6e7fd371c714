"""What made the KV: the dtype of SGLang's cache, and the model's fingerprint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hetkv.errors import HetkvError
from hetkv.integrations.fingerprint import checkpoint_fingerprint

_log = logging.getLogger(__name__)
_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_of(args: Any, server_args: Any) -> str:
    """Of the cache's elements. `args`: SGLang's `KVArgs`."""
    name = str(args.kv_cache_dtype_str).removeprefix("torch.")
    if name == "auto":
        name = str(server_args.dtype).removeprefix("torch.")
    return _NAMES.get(name, name)


def add_heads(args: Any, server_args: Any, tp: int) -> None:
    """SGLang's decode leaves out of `KVArgs` how many KV heads the model and the rank have."""
    if getattr(args, "kv_head_num", None) is None:
        from sglang.srt.configs.model_config import ModelConfig

        args.total_kv_head_num = ModelConfig.from_server_args(server_args).get_total_num_kv_heads()
        args.kv_head_num = max(1, args.total_kv_head_num // tp)


def fingerprint_of(server_args: Any) -> dict[str, str]:
    """Of the checkpoint directory; nothing, with a line in the log, where there is none at hand."""
    folder = Path(str(server_args.model_path))
    try:
        return checkpoint_fingerprint(folder)
    except (OSError, HetkvError) as error:
        _log.warning("%s: a peer with another model will not be noticed: %s", folder, error)
        return {}
