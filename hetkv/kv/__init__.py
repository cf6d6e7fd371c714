"""KV geometry and memory: spec, shards, layouts, pools, resharding.

Imports `hetkv.errors` and nothing above it; torch only inside functions that are given tensors.
"""
