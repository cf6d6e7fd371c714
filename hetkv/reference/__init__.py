"""The second implementation: wire codec, checksum and remap in plain Python and PyTorch.

The oracle of tests and tools; no transfer imports it. May import `hetkv.kv`.
"""
