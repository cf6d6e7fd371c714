"""What a request's KV depends on other than the model, as producer and consumer compare it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from hetkv.errors import InputError
from hetkv.transport.content import content_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


def content_of(request: Request) -> bytes:
    """Digest of the prompt: its tokens, images and their positions, adapter, cache salt, embeddings.

    An adapter counts by its name, as hosts keep it in different places; images and the like by vLLM's hash.
    """
    extra: list[Any] = [
        ("mm", feature.modality, _bytes(feature.identifier), feature.mm_position.offset, feature.mm_position.length)
        for feature in request.mm_features
    ]
    if request.lora_request is not None:
        extra.append(("lora", _bytes(request.lora_request.lora_name)))
    if request.cache_salt:
        extra.append(("salt", _bytes(request.cache_salt)))
    if request.prompt_embeds is not None:
        embeds = request.prompt_embeds.detach().cpu().contiguous()
        data = embeds.flatten().view(torch.uint8).numpy()
        extra.append(("embeds", str(embeds.dtype), list(embeds.shape), hashlib.sha256(data).digest()))
    return content_digest(request.prompt_token_ids or (), extra)


def check_hashes(config: VllmConfig) -> None:
    """Raise `InputError` where vLLM gives images random names instead of hashes: two instances would never agree."""
    model = config.model_config
    if not model.is_multimodal_model or config.cache_config.enable_prefix_caching:
        return
    if model.multimodal_config is None or model.multimodal_config.mm_processor_cache_gb == 0:
        raise InputError(
            "a multimodal model with neither prefix caching nor --mm-processor-cache-gb: vLLM does not hash its "
            "inputs then, and KV of one image would look like that of another; enable either"
        )


def _bytes(text: str) -> bytes:
    """Clients' text, which may not be Unicode: JSON can hold half of a surrogate pair."""
    return text.encode(errors="surrogatepass")
