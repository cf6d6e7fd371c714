"""transformers: a `Cache` whose layers are a pool's memory (`PooledCache`), and an engine over it.

`docs/other-engines.md` says how. May import: hetkv, hetkv.integrations, transformers, torch.
"""
