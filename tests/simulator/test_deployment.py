"""plan.yaml: what it says, and one clear line for each way to get it wrong."""

from __future__ import annotations

import pytest

from hetkv.errors import InputError
from hetkv.simulator.deployment import build_pools, dump_plan, load_plan, port_bytes_per_second

GOOD = """
model: Llama-3.1-8B
engine: {version: "0.9", max_num_seqs: 64}
pools:
  - {role: prefill, gpu: H100-SXM, count: 2, engine: {prefix_caching: true}}
  - {role: decode, gpu: A100-80-SXM, tp: 2, count: 3, engine: {max_num_seqs: 128}}
link: {gb_s: 25, latency_us: 50}
routing: {prefill: prefix_aware}
prices:
  - {gpu: H100-SXM, usd_per_gpu_hour: 2.5, basis: on_demand, as_of: "2026-05"}
"""


def write(tmp_path, text):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    return file


def test_plan_is_read_and_written_back(tmp_path):
    plan = load_plan(write(tmp_path, GOOD))
    again = load_plan(write(tmp_path, dump_plan(plan)))
    assert plan == again
    prefill, decode = build_pools(plan)
    assert (prefill.name, prefill.max_num_seqs, prefill.prefix_caching, prefill.gpus) == ("prefill", 64, True, 1)
    assert (decode.count, decode.max_num_seqs, decode.prefix_caching, decode.gpus) == (3, 128, False, 2)
    assert decode.kv_blocks == decode.model.kv_capacity_tokens // 16
    assert decode.layers == 32
    assert port_bytes_per_second(plan) == 25e9


def test_nic_bandwidth_is_the_slowest_instance(tmp_path):
    plan = load_plan(write(tmp_path, GOOD.replace("gb_s: 25", "gb_s: nic")))
    assert port_bytes_per_second(plan) == 50e9  # one H100 with 400 Gbit/s, two A100 with 200 each


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("model: Llama-3.1-8B", "", "missing required field `model`"),
        ("tp: 2", "tp: two", r"Expected `int`, got `str` - at `\$.pools\[1\].tp`"),
        ("tp: 2", "tp: 0", r"pools\[1\] \(decode\): `tp` must be greater than 0, got 0"),
        ("role: decode", "role: both", r"\$.pools\[1\].role"),
        ("role: decode", "role: aggregated", "role prefill but not decode"),
        ("link: {gb_s: 25, latency_us: 50}", "", "missing field `link`"),
        ("gb_s: 25", "gb_s: -1", "link `gb_s` must be greater than 0"),
        ("gb_s: 25", "gb: 25", "unknown field `gb`"),
        ("prefill: prefix_aware", "prefill: random", r"\$.routing.prefill"),
        ("max_num_seqs: 128", "max_seqs: 128", "pool decode: engine: .*unknown field `max_seqs`"),
        ("max_num_seqs: 128", "max_num_seqs: 9000", "leaves no room for prompts"),
        ("role: decode", "name: prefill, role: decode", "two pools have this name"),
        ("basis: on_demand", "basis: free", r"\$.prices\[0\].basis"),
        ("routing:", "failures: {outages: [{instance: decode/9, at_s: -1}]}\nrouting:", "`at_s` must be 0 or more"),
        ("model:", "model: [", "not YAML"),
        (GOOD, "pools: []\nmodel: x", "`pools` is empty"),
        (GOOD, "- 1", "Expected `object`"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, fault):
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(InputError, match=fault) as caught:
        load_plan(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_prices_of_different_basis_need_consent(tmp_path):
    other = '  - {gpu: A100-80-SXM, usd_per_gpu_hour: 1, basis: reserved, as_of: "2026-05"}\n'
    with pytest.raises(InputError, match="different basis"):
        load_plan(write(tmp_path, GOOD + other))
    assert len(load_plan(write(tmp_path, GOOD + other + "allow_mixed_price_bases: true\n")).prices) == 2


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("gpu: H100-SXM, count", "gpu: H900, count", "unknown GPU 'H900'"),
        ("model: Llama-3.1-8B", "model: Llama-9", "Llama-9"),
        ("model: Llama-3.1-8B", "model: Llama-3.1-405B", "does not fit"),
        ("tp: 2", "kv_tokens: 8", "room for 8 KV tokens"),
    ],
)
def test_what_cannot_be_built_is_named(tmp_path, old, new, fault):
    plan = load_plan(write(tmp_path, GOOD.replace(old, new)))
    with pytest.raises(InputError, match=fault) as caught:
        build_pools(plan, "plan.yaml")
    assert str(caught.value).startswith("plan.yaml: ")


def test_a_plan_that_is_not_text(tmp_path):
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_plan(tmp_path / "plan.yaml")


def test_catalogue_files_count_from_the_plan(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "gpus:\n  H900:\n    vendor: nvidia\n    figures: {topology: switch, bf16_tflops: 100, memory_gib: 64}\n"
    )
    text = GOOD.replace("gpu: H100-SXM, count", "gpu: H900, count") + "catalogue: [mine.yaml]\n"
    with pytest.raises(InputError, match="H900: figure `memory_tb_s`"):
        build_pools(load_plan(write(tmp_path, text)))
