"""The control channel between two ranks: sockets, handshake, descriptions, and whether two sides fit.

Imports `hetkv.kv`.
"""
