"""hetkv moves the KV cache of large language models between GPUs that do not match."""

__version__ = "0.1.0"
