"""Stored fits are found again on another CPU."""

from __future__ import annotations

import math

from hetkv.costmodel.calibration.fit import Prior
from hetkv.costmodel.calibration.fit_store import digest


def test_the_last_digits_of_a_number_do_not_name_another_fit():
    start = 0.06123456789012345
    names = {digest([("row", 2, "v0.11.2")], Prior(x, 1e-7, 1.0, 0.3)) for x in (start, math.nextafter(start, 1))}
    assert len(names) == 1


def test_what_differs_names_another_fit():
    row, prior = ("row", 2, "v0.11.2"), Prior(0.06, 1e-7, 1.0, 0.3)
    others = [
        digest([("row", 3, "v0.11.2")], prior),
        digest([("row", 2, "v0.11.3")], prior),
        digest([row], prior._replace(start=0.0600001)),
        digest([row], prior._replace(low=1.1e-7)),
        digest([row, row], prior),
    ]
    assert len({digest([row], prior), *others}) == 6
