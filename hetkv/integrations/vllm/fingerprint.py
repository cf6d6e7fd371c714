"""What made this instance's KV, for the handshake: weights, vocabulary, config and rope of vLLM's model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from hetkv.integrations.fingerprint import config_fingerprint, folder_vocabulary, weights_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)


def fingerprint_of(config: VllmConfig) -> dict[str, str]:
    """Of the model as it runs: with what `--hf-overrides` changed. What cannot be known is left out, and logged."""
    model = config.model_config
    found = config_fingerprint(model.hf_text_config.to_dict())
    folder = _folder(model.model, model.revision)
    weights = weights_digest(folder) if folder is not None and config.load_config.load_format != "dummy" else None
    if weights is None:
        _log.warning("%s: no safetensors files at hand: a peer with other weights will not be noticed", model.model)
    else:
        found["weights"] = weights
    folder = _folder(model.tokenizer, model.tokenizer_revision)
    vocabulary = folder_vocabulary(folder) if folder is not None else None
    return found if vocabulary is None else {**found, "vocabulary": vocabulary}


def _folder(name: str | None, revision: str | None) -> Path | None:
    """Where a model or tokenizer is: a folder, or a snapshot in Hugging Face's cache, from which vLLM has read it."""
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
