"""What comes between the end of a prefill and the first token that a decode instance gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Handover(NamedTuple):
    """Times are seconds. `token_s` and `state_s`: transfer of a token's KV and of a sequence's state; `prompt_s`:
    prefill of a token, during which all but the last of `layers` are sent (0: nothing is); `step_s`: the wait for a
    decode step and the step itself.
    """

    token_s: float
    state_s: float
    prompt_s: float
    layers: int
    fixed_s: float
    step_s: float

    def seconds(self, prompts: Array) -> Array:
        """For prompts of these lengths, on an idle link."""
        alone = prompts * self.token_s + self.state_s
        if self.prompt_s:
            hidden = prompts * self.prompt_s * (1 - 1 / self.layers)
            alone = np.maximum(alone / self.layers, alone - hidden)
        return alone + self.fixed_s + self.step_s
