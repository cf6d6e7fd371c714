"""hetkv's own decoder (`hetkv.runtime`) as an engine among the others.

May import: hetkv, hetkv.runtime, hetkv.integrations, torch.
"""
