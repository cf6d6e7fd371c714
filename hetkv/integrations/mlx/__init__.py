"""MLX: `mlx_lm`'s `KVCache` in and out of a pool (`CacheMemory`), and an engine over it.

`docs/other-engines.md` says how. May import: hetkv, hetkv.integrations, mlx, mlx_lm.
"""
