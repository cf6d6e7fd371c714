"""What is shipped remakes itself: docs/accuracy.md and the calibration file, from the stored fits and the data."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from hetkv.cli.calibrate import SECTIONS, SIMULATOR
from hetkv.costmodel import load_catalogue
from hetkv.costmodel.calibration.calibrate import ship
from hetkv.costmodel.calibration.fit_store import shipped_fits, stored
from hetkv.costmodel.calibration.report import render, sections
from hetkv.costmodel.calibration_file import dump_efficiencies, load_efficiencies
from tests.costmodel.test_calibrate import DATA, needs_data

DOCUMENT = Path(__file__).parents[2] / "docs/accuracy.md"


@needs_data
@pytest.mark.timeout(600)
def test_every_line_of_the_accuracy_document_comes_from_the_shipped_fits() -> None:
    for name in SECTIONS:
        import_module(name)
    with stored(shipped_fits(sealed=True)):
        found = render(DATA, SECTIONS)
    for made, written in zip(found.splitlines(), DOCUMENT.read_text(encoding="utf-8").splitlines(), strict=True):
        assert made == written


@needs_data
@pytest.mark.timeout(600)
def test_the_shipped_entries_are_those_of_the_shipped_fits() -> None:
    with stored(shipped_fits(sealed=True)):
        found = ship(DATA, load_catalogue())
    assert dump_efficiencies(found, "x") == dump_efficiencies(load_efficiencies().entries.values(), "x")


def test_sections_come_in_order_and_by_document() -> None:
    for name in (*SECTIONS, *SIMULATOR):
        import_module(name)
    names = list(sections(SECTIONS))
    assert names.index("splitwise") < names.index("serving-hopper") < names.index("decisions")
    assert not set(names) & set(sections(SIMULATOR))
