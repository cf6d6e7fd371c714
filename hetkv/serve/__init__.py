"""The whole system: a global scheduler, instances that prefill and decode, and an OpenAI-compatible server before them.

`hetkv serve` starts it. Requests are paired by the simulator's own `Router`: what is simulated is what runs.
May import `hetkv.runtime`, `hetkv.transport` and `hetkv.simulator`; only the command imports it.
"""
