"""A checkpoint's `config.json` and `generation_config.json`, read once into types that all of hetkv shares.

Families are data, `ModelConfig` is what they are read into. A key is understood, known not to matter, or rejected by
name. May import `hetkv.errors` and `hetkv.kv.spec`; no torch, no transformers.
"""

from hetkv.models.config import Experts, IndexedAttention, Latent, ModelConfig, Norms, Rope, State
from hetkv.models.families import FAMILIES
from hetkv.models.generation import Generation, read_generation
from hetkv.models.reader import parse_config, read_config

__all__ = [
    "FAMILIES",
    "Experts",
    "Generation",
    "IndexedAttention",
    "Latent",
    "ModelConfig",
    "Norms",
    "Rope",
    "State",
    "parse_config",
    "read_config",
    "read_generation",
]
