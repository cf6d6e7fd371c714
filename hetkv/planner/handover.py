"""What comes between the end of a prefill and the first token that a decode instance gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetkv.costmodel import RequestBytes

Array = NDArray[np.float64]


class Handover(NamedTuple):
    """`kv` goes over a port of `port` bytes per second. Times are seconds: `prompt_s`: prefill of a token, during which
    all but the last of `layers` are sent (0: nothing is); `step_s`: the wait for a decode step and the step itself.
    """

    kv: RequestBytes
    port: float
    prompt_s: float
    layers: int
    fixed_s: float
    step_s: float

    def seconds(self, prompts: Array) -> Array:
        """For prompts of these lengths, on an idle link."""
        alone = self.kv.bytes(prompts) / self.port
        if self.prompt_s:
            hidden = prompts * self.prompt_s * (1 - 1 / self.layers)
            alone = np.maximum(alone / self.layers, alone - hidden)
        return np.asarray(alone + self.fixed_s + self.step_s)
