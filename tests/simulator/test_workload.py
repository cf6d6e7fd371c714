"""Arrivals, lengths, trace files and their broken lines."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from hetkv.errors import InputError
from hetkv.simulator.traffic.lengths import parse_lengths
from hetkv.simulator.traffic.sources import Traffic
from hetkv.simulator.traffic.trace import Trace
from hetkv.simulator.traffic.workload import Synthetic

SHARED = Path(os.environ.get("HETKV_SHARED", Path(__file__).parents[3] / "shared"))
ONE = parse_lengths("1", "")


def gaps(workload, seed=0):
    return np.diff([0.0, *(r.arrival for r in workload.requests(seed))])


@pytest.mark.parametrize(
    ("arrivals", "cv", "expected"),
    [("poisson", 1.0, 1.0), ("gamma", 2.5, 2.5), ("gamma", 0.5, 0.5), ("constant", 1.0, 0.0)],
)
def test_gaps_have_the_rate_and_the_variation(arrivals, cv, expected):
    found = gaps(Synthetic(4.0, ONE, ONE, count=60_000, arrivals=arrivals, cv=cv))
    assert len(found) == 60_000
    assert found.mean() == pytest.approx(0.25, rel=0.03)
    assert found.std() / found.mean() == pytest.approx(expected, rel=0.03, abs=1e-9)


def test_same_seed_same_traffic_and_lengths_do_not_depend_on_arrivals():
    def rows(seed, **kind):
        work = Synthetic(
            9.0, parse_lengths("lognormal:500:1", ""), parse_lengths("uniform:5:9", ""), count=5000, **kind
        )
        return [(r.arrival, r.prompt, r.output) for r in work.requests(seed)]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)
    assert [r[1:] for r in rows(3)] == [r[1:] for r in rows(3, arrivals="gamma", cv=3.0)]


def test_duration_ends_arrivals():
    work = Synthetic(100.0, ONE, ONE, duration=50.0)
    arrivals = [r.arrival for r in work.requests(0)]
    assert max(arrivals) <= 50.0
    assert len(arrivals) == pytest.approx(5000, rel=0.05)


@pytest.mark.parametrize(
    ("text", "mean"),
    [("128", 128), ("uniform:10:30", 20), ("exponential:700", 700), ("geometric:50", 50), ("lognormal:1024:0.8", 1024)],
)
def test_lengths_have_their_mean(text, mean):
    values = parse_lengths(text, "--prompt-tokens")(np.random.default_rng(0), 100_000)
    assert values.min() >= 1
    assert values.mean() == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize(
    "text", ["", "abc", "0", "-4", "uniform:10", "uniform:30:10", "lognormal:1e3:0", "pareto:3", "nan"]
)
def test_bad_lengths_name_the_option(text):
    with pytest.raises(InputError, match="--prompt-tokens"):
        parse_lengths(text, "--prompt-tokens")


def test_azure_file_keeps_seven_decimals(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:16:50.9951691,396,109\r\n"
    )
    first, second = Trace(file).requests(0)
    assert (first.arrival, first.prompt, first.output) == (0.0, 374, 44)
    assert second.arrival == pytest.approx(64.3145791, abs=2e-8)
    assert next(islice(Trace(file, speedup=2).requests(0), 1, None)).arrival == pytest.approx(32.15728955, abs=2e-8)
    assert len(list(Trace(file, limit=1).requests(0))) == 1


def test_mooncake_file_has_hashes(tmp_path):
    file = tmp_path / "m.jsonl"
    file.write_text(
        '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'
        '{"timestamp": 4500, "input_length": 512, "output_length": 1, "hash_ids": [7]}\n'
    )
    trace = Trace(file)
    assert trace.hash_tokens == 512
    assert [(r.arrival, r.prompt, r.hashes) for r in trace.requests(0)] == [(0.0, 600, (7, 8)), (1.5, 512, (7,))]


def first_rows(tmp_path, data):
    file = tmp_path / "t"
    file.write_bytes(data)
    trace = Trace(file)
    return trace.hash_tokens, [(r.arrival, r.prompt, r.output, r.hashes) for r in trace.requests(0)]


TRACES = {
    "azure 2024": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n2024-05-10 02:00:01+02:00,7,8\n",
        0,
        [(0.0, 2162, 5, None), (0.99007, 2399, 6, None), (0.99007, 7, 8, None)],
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n",
        0,
        [(0.0, 472, 18, None), (113.0, 417, 276, None)],
    ),
    "burstgpt with sessions": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.5,1,2,ChatGPT,472,18,490,Conversation log\n",
        0,
        [(0.0, 472, 18, None)],
    ),
    "mooncake without hashes": (
        '{"timestamp": 1500, "input_length": 6, "output_length": 5}\n',
        0,
        [(0.0, 6, 5, None)],
    ),
    "qwen-bailian": (
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 2.5, "input_length": 33, "output_length": 5, '
        '"type": "text", "turn": 1, "hash_ids": [1, 2, 3]}\n'
        '{"chat_id": 2, "parent_chat_id": 1, "timestamp": 4.0, "input_length": 33, "output_length": 5, '
        '"type": "text", "turn": 2, "hash_ids": [1, 2]}\n',
        16,
        [(0.0, 33, 5, (1, 2, 3)), (1.5, 33, 5, (1, 2))],
    ),
}


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("wrap", ["plain", "gz", "crlf", "bom", "all"])
def test_traces_as_people_have_them(tmp_path, name, wrap):
    text, hash_tokens, rows = TRACES[name]
    data = text.encode()
    if wrap in ("crlf", "all"):
        data = data.replace(b"\n", b"\r\n")
    if wrap in ("bom", "all"):
        data = b"\xef\xbb\xbf" + data
    if wrap in ("gz", "all"):
        data = gzip.compress(data)
    found = first_rows(tmp_path, data)
    assert found[0] == hash_tokens
    assert [row[1:] for row in found[1]] == [row[1:] for row in rows]
    assert [row[0] for row in found[1]] == pytest.approx([row[0] for row in rows], abs=1e-6)


def test_a_long_trace_takes_the_memory_of_one_row(tmp_path):
    file = tmp_path / "long.csv"
    with file.open("w") as out:
        out.write("arrival_s,prompt_tokens,output_tokens\n")
        out.writelines(f"{i},100,10\n" for i in range(200_000))
    tracemalloc.start()
    assert sum(1 for _ in Trace(file).requests(0)) == 200_000
    assert tracemalloc.get_traced_memory()[1] < 4e6  # as rows they would take more than 30 MB
    tracemalloc.stop()


def test_a_gzip_file_that_ends_early_is_named(tmp_path):
    file = tmp_path / "t.gz"
    file.write_bytes(gzip.compress((PLAIN * 1).encode())[:-9])
    with pytest.raises(InputError, match="gzip file is broken"):
        Trace(file)


PLAIN = "arrival_s,prompt_tokens,output_tokens\n0.5,10,2\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
MOON = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        (PLAIN + "0.7,10\n", 3, "2 fields, expected 3"),
        (PLAIN + "\n0.7,ten,2\n", 4, "'ten' is not a number of tokens"),
        (PLAIN + "0.7,-3,2\n", 3, "'-3' is not a number of tokens"),
        (PLAIN + "0.7,3,0\n", 3, "0 output tokens"),
        (PLAIN + "0.4,3,1\n", 3, "before the request above"),
        (PLAIN + "nan,3,1\n", 3, "arrival nan"),
        (PLAIN + "soon,3,1\n", 3, "could not convert"),
        (AZURE + "2023-13-16 18:15:46.6805900,374,44\n", 3, "month must be in 1..12"),
        (AZURE + "2023-11-16 18:15,374,44\n", 3, "is not a time"),
        (MOON + '{"timestamp": 1, "input_length": 600, "output_length": 5}\n', 2, "missing required field `hash_ids`"),
        (MOON + '{"timestamp": 1, "input_length": 600,\n', 2, "JSON is malformed|truncated"),
        (
            MOON + '{"timestamp": 1, "input_length": 600, "output_length": 5, "hash_ids": [1]}\n',
            2,
            "1 hash_ids for 600",
        ),
        (MOON + '{"timestamp": 1, "input_length": "x", "output_length": 5, "hash_ids": [1]}\n', 2, "Expected `int`"),
        ("a,b,c\n1,2,3\n", 1, "not a known trace"),
    ],
)
def test_broken_line_is_named(tmp_path, text, line, fault):
    file = tmp_path / "trace"
    file.write_text(text)
    with pytest.raises(InputError, match=fault) as caught:
        Trace(file)
    assert str(caught.value).startswith(f"{file}:{line}: ")
    assert "\n" not in str(caught.value)


def test_empty_and_binary_files_are_errors(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="no requests"):
        Trace(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(PLAIN.encode() + b"\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        Trace(tmp_path / "binary")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({}, "give one of --trace, --rate and --clients"),
        ({"trace": "x", "rate": 1.0}, "give one of --trace, --rate and --clients"),
        ({"trace": "x", "duration": 1.0}, "--duration"),
        ({"rate": 0.0}, "rate must be"),
        ({"rate": float("nan")}, "rate must be"),
        ({"rate": 1.0, "requests": 0}, "requests must be"),
        ({"rate": 1.0, "duration": -1.0}, "duration must be"),
        ({"rate": 1.0, "arrivals": "gamma", "cv": 0.0}, "cv must be"),
    ],
)
def test_bad_traffic_options(options, fault):
    with pytest.raises(InputError, match=fault):
        Traffic(**options).build()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data folder (HETKV_SHARED) is not here")
@pytest.mark.parametrize(
    ("name", "count"),
    [("azure2023_conv.csv", 19366), ("azure2023_code.csv", 8819), ("mooncake_conversation.jsonl", 12031)],
)
def test_public_traces_are_read_whole(name, count):
    requests = list(Trace(SHARED / "data/traces" / name).requests(0))
    assert len(requests) == count
    assert requests[0].arrival == 0.0
    assert 3400 < requests[-1].arrival < 3600
