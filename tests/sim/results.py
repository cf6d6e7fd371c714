"""What a run of the simulator or a hunt found, kept as one key of a file of bench/results: `record`."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any


def record(out: Path, key: str, found: dict[str, Any]) -> None:
    """Sets `key` of the file to what was found, with the commit that was run, and leaves its other keys."""
    whole = json.loads(out.read_text()) if out.exists() else {"benchmark": "fault simulation"}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    whole[key] = {"commit": commit, "cpu": platform.processor() or platform.machine(), **found}
    out.write_text(json.dumps(whole, indent=1) + "\n")
