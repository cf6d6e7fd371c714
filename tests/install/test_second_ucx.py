"""Another user of UCX in the process, imported before hetkv or after hetkv has loaded its own: each goes on working.

UCXX (`ucxx-cu13`, 320 MB with what it needs) is in no environment of this project by default. NIXL is in
`tests/vllm/test_nixl.py`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

CODE = """
import sys
if sys.argv[1] == "before":
    from ucxx._lib.libucxx import UCXContext, UCXWorker
from hetkv import KVPool, KVSpec, TransferConfig
from tests.transport.peers import check_transfer, connected, randomise

def other():
    context = UCXContext({})
    worker = UCXWorker(context)

    def works():
        worker.progress()
        return worker.handle != 0

    return works

works = other() if sys.argv[1] == "before" else None
spec = KVSpec.uniform(2, 2, 64)
here, there = randomise(KVPool.allocate(spec, 16), 1), KVPool.allocate(spec, 16)
with connected([here], [there], TransferConfig(rma="auto")) as ([sender], [receiver]):
    check_transfer(here, there, sender, receiver, 100)
    if sys.argv[1] == "after":
        from ucxx._lib.libucxx import UCXContext, UCXWorker
    works = works or other()
    assert works()
    check_transfer(here, there, sender, receiver, 100, request="another", seed=1)
    assert works()
assert works()
with connected([here], [there], TransferConfig(rma="auto")) as ([sender], [receiver]):
    check_transfer(here, there, sender, receiver, 100)
print("fine")
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_ucxx_and_hetkv_work_in_one_process(when: str) -> None:
    if importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx-cu13 is not installed")
    environment = {**os.environ, "UCX_WARN_UNUSED_ENV_VARS": "n"}
    command = [sys.executable, "-c", CODE, when]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stdout[-2000:] + done.stderr[-4000:]
