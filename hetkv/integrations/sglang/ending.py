"""A request that is over for SGLang while its transfer may still touch its pages: `Ending`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hetkv.transport.handle import Handle

_log = logging.getLogger(__name__)
DRAIN_S = 60.0
"""Until a transfer that does not end is reported."""
LOOK_S = 0.002
"""Between two looks at what is under way."""


class Ending:
    """A transfer that was given up. Its pages are SGLang's again once it is `over`, however long that takes."""

    def __init__(self, handle: Handle) -> None:
        self._handle, self._since, self._logged = handle, time.monotonic(), False

    def over(self) -> bool:
        """Whether nothing reads or writes the pages any more. Logs one error where that takes more than `DRAIN_S`."""
        if self._handle.done():
            return True
        if not self._logged and time.monotonic() - self._since > DRAIN_S:
            self._logged = True
            _log.error(
                "%r was given up %g s ago and still uses its pages: they stay held until it ends", self._handle, DRAIN_S
            )
        return False


def wait_for(over: Callable[[int], bool], room: int) -> None:
    """Return once a request is over, as pages that are given back before that would be read or overwritten."""
    while not over(room):
        time.sleep(LOOK_S)
