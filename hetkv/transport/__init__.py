"""The data plane as Python sees it: `Sender`, `Receiver`, their request handles, links and devices.

Imports `hetkv.control` and `hetkv.kv`; the engine itself is C++ (`csrc/engine`).
"""
