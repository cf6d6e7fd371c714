"""Connectors that serving engines load, a folder an engine.

May import `hetkv.transport` and `hetkv.models`; an engine itself is imported in the folder of its name only.
"""
