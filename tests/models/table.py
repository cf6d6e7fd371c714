"""The table of docs/models.md, out of a JUnit report of the zoo:

python -m pytest tests/models/test_zoo.py --junitxml zoo.xml
python -m tests.models.table zoo.xml
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from hetkv.models import FAMILIES
from tests.models import zoo, zoo_edits

DOC = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table of tests/models/table.py -->\n", "<!-- end of the table -->\n"


def outcomes(reports: list[str]) -> Counter[tuple[str, str]]:
    """How often each family's specimens were identical, rejected by name, or wrong, in all reports together."""
    known = {one.name: one for one in [*zoo.specimens(), *zoo_edits.specimens()]}
    found: Counter[tuple[str, str]] = Counter()
    for case in (case for report in reports for case in ET.parse(report).iter("testcase")):
        match = re.fullmatch(r"test_(a_cross_section|all_others)\[(.*)\]", case.get("name", ""))
        if match is None or case.find("skipped") is not None:
            continue
        one = known.pop(match[2])
        failed = case.find("failure") is not None or case.find("error") is not None
        found[one.family, "wrong" if failed else "rejected" if one.rejected else "identical"] += 1
    if known:
        raise SystemExit(f"{reports} lack {len(known)} specimens, such as {next(iter(known))}")
    return found


def table(found: Counter[tuple[str, str]]) -> str:
    """Markdown."""
    lines = [
        "| `model_type` | architecture | runtime | identical | rejected by name | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        counts = [found[name, kind] for kind in ("identical", "rejected", "wrong")]
        shown = " | ".join(map(str, counts)) if sum(counts) else " | | "
        lines.append(f"| {name} | {family.architecture} | {'yes' if family.computed else 'sizes alone'} | {shown} |")
    others = sorted({name for name, _ in found} - set(FAMILIES))
    counts = [sum(found[name, kind] for name in others) for kind in ("identical", "rejected", "wrong")]
    lines.append(f"| {', '.join(others)} | | no | " + " | ".join(map(str, counts)) + " |")
    totals = [sum(n for (_, kind), n in found.items() if kind == k) for k in ("identical", "rejected", "wrong")]
    lines.append(f"| all {sum(totals)} | | | " + " | ".join(map(str, totals)) + " |")
    return "\n".join(lines) + "\n"


def main(*reports: str) -> None:
    """Put the table into the document."""
    text = DOC.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOC.write_text(before + BEGIN + "\n" + table(outcomes(list(reports))) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
