"""Event-driven simulator of LLM serving: what a deployment does to a given traffic. Imports `hetkv.costmodel` only."""
