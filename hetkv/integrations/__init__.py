"""Connectors that serving engines load. Each engine's imports stay in the folder of its name."""
