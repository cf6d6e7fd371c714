"""hetkv's own decoder (`hetkv.runtime`) as an engine among the others."""
