"""KV geometry and memory: spec, shards, layouts, pools, resharding.

Imports `hetkv.errors` and nothing above it; torch and NumPy only inside functions that are given their arrays.
"""
