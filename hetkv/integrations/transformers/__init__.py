"""transformers: a `Cache` whose layers are a pool's memory (`PooledCache`), its paged cache as a pool, and engines.

`docs/other-engines.md` says how. May import: hetkv, hetkv.integrations, transformers, torch.
"""
