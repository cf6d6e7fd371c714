"""`hetkv bench remap`: the facts of its JSON, and bad options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetkv.bench import remap, remap_cases
from hetkv.cli import main


def test_json_holds_the_measurement(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    argv = ["bench", "remap", "--json", str(file), "--repeats", "3", "--only", "canonical -> nhd 16, bf16 -> fp16"]
    assert main(argv) == 0
    report = json.loads(file.read_text())
    assert report["device"]
    assert report["versions"]["hetkv"]
    assert "commit" in report
    assert [row["checksum"] for row in report["results"]] == [True, False]
    for row in report["results"]:
        assert row["bytes"] == 2 * remap.NARROW_BYTES
        assert row["ratio"] == pytest.approx(row["gb_s"] / row["copy_gb_s"], rel=0.02)
        assert row["target"] == 0.6


def test_every_kind_of_case_is_there() -> None:
    assert {case.kind for case in remap_cases.cases()} == set(remap.TARGETS)
    names = [case.name for case in remap_cases.cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("options", [["--threads", "0"], ["--only", "no such case"], ["--isa", "mmx"]])
def test_bad_options_exit_with_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "remap", *options]) == 2
    assert options[1] in capsys.readouterr().err
