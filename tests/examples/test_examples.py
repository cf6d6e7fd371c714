"""Every example runs as it is; the programs of docs/integrate.md run as they are written there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NEWCOMER_LINES = 20


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert not error
    return out


def test_numpy_to_numpy(tmp_path: Path) -> None:
    file = EXAMPLES / "numpy_to_numpy.py"
    decode, prefill = start(tmp_path, file, "decode"), start(tmp_path, file, "prefill")
    assert output(decode) == "arrived: 1.5 0.0\n"
    assert output(prefill) == ""


def test_torch_tp2_to_tp1(tmp_path: Path) -> None:
    assert output(start(tmp_path, EXAMPLES / "torch_tp2_to_tp1.py")) == f"arrived: {[1.0] * 4 + [2.0] * 4}\n"


def test_layer_by_layer(tmp_path: Path) -> None:
    lines = output(start(tmp_path, EXAMPLES / "layer_by_layer.py")).splitlines()
    assert lines == [f"layer {layer} last token {49.0 * (layer + 1)}" for layer in range(4)]


def test_asyncio(tmp_path: Path) -> None:
    lines = output(start(tmp_path, EXAMPLES / "asyncio_server.py")).splitlines()
    assert sorted(line for line in lines if "arrived" in line) == [f"request-{n} arrived" for n in (0, 1, 2, 4)]
    failed = [line for line in lines if "arrived" not in line]
    assert 1 <= len(failed) <= 2
    assert all(line.startswith("AbortedError: ") and line.endswith("the client went away") for line in failed)


def programs(page: str = "integrate.md") -> dict[str, str]:
    """Python of a page that says in its first line which file it is."""
    text = (ROOT / "docs" / page).read_text()
    found = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL)
    return dict(found)


def code_lines(program: str) -> int:
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in program.splitlines())


def test_the_programs_of_the_guide(tmp_path: Path) -> None:
    for name, program in programs().items():
        (tmp_path / name).write_text(program)
    assert sum(code_lines(programs()[name]) for name in ("prefill.py", "decode.py")) < NEWCOMER_LINES + 5
    assert all(code_lines(program) < NEWCOMER_LINES for program in programs().values())
    ended = [start(tmp_path, "decode.py"), start(tmp_path, "prefill.py")]
    assert output(ended[0]) == "1.5\n"
    output(ended[1])
    ended = [start(tmp_path, "decode_tp1.py"), *(start(tmp_path, "prefill_tp2.py", str(rank)) for rank in range(2))]
    assert output(ended[0]) == "[1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]\n"
    for process in ended[1:]:
        output(process)


def test_the_program_of_the_page_on_storage(tmp_path: Path) -> None:
    (tmp_path / "storage.py").write_text(programs("storage.md")["storage.py"])
    assert output(start(tmp_path, "storage.py")) == "read: 1.0 0.0\n"


def test_the_guide_names_what_is_there() -> None:
    """Each attribute of hetkv that its Python uses exists; the rest of its snippets are at least Python."""
    import hetkv

    text = (ROOT / "docs" / "integrate.md").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module == "hetkv":
                assert {name.name for name in node.names} <= set(dir(hetkv))
