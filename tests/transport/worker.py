"""The other process of test_processes.py: `worker.py ROLE ADDRESS`. Prints what happens.

A sender or a receiver that links to ADDRESS (or, with `-`, listens and prints where), then obeys lines of its input:
`send N` and `receive N` start request N (a sender sends layer 0 alone), `layer N` sends the rest, `wait N` prints how
it ended, `cpu S` prints the share of a core used in S seconds, `exit` returns from main without `close`.
"""

from __future__ import annotations

import sys
import time

from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SPEC = KVSpec.uniform(2, 2, 64)
SECRET = b"a secret of tests"
CONFIG = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384)
BLOCKS = list(range(8))
TOKENS = 8 * 16


def main() -> None:
    role, address = sys.argv[1:]
    kind = Sender if role == "sender" else Receiver
    node = kind(KVPool.allocate(SPEC, 16), secret=SECRET, instance=f"{role}-process", config=CONFIG)
    if address == "-":
        print(node.listen(), flush=True)
    else:
        node.connect(address)
        print("linked", flush=True)
    requests = {}
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "send":
            requests[rest[0]] = node.send(rest[0], BLOCKS, TOKENS)
            requests[rest[0]].send_layer(0)
        elif verb == "receive":
            requests[rest[0]] = node.receive(rest[0], BLOCKS, TOKENS)
        elif verb == "layer":
            requests[rest[0]].send_layer(1)
        elif verb == "wait":
            try:
                requests[rest[0]].wait(20)
                print("complete", flush=True)
                continue
            except HetkvError as error:
                print(type(error).__name__, flush=True)
                continue
        elif verb == "cpu":
            start = time.process_time()
            time.sleep(float(rest[0]))
            print((time.process_time() - start) / float(rest[0]), flush=True)
            continue
        elif verb == "exit":
            return
        print("ok", flush=True)


if __name__ == "__main__":
    main()
