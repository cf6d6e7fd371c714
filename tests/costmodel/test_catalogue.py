"""The GPU catalogue, prices, and what a user lays over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetkv.costmodel.catalogue import UNITS, load_catalogue
from hetkv.costmodel.collectives import SWITCH_BYTES, all_reduce
from hetkv.errors import InputError

CATALOGUE = load_catalogue()
LISTED = [
    "A100-40-SXM",
    "A100-80-SXM",
    "H100-SXM",
    "H100-PCIe",
    "H200-SXM",
    "H20",
    "H800-SXM",
    "B200-SXM",
    "B300-SXM",
    "GB200",
    "GB300",
    "GH200",
    "L40S",
    "L4",
    "MI210",
    "MI250",
    "MI250X",
    "MI300X",
    "MI325X",
    "MI350X",
    "MI355X",
    "Max-1550",
    "Ascend-910B",
    "Gaudi2",
    "Gaudi3",
    "RTX-4090",
    "RTX-PRO-6000",
]
NEEDED = ("bf16_tflops", "memory_gib", "memory_tb_s", "pair_gb_s", "gpu_gb_s", "gpus_per_node", "host_speed")


@pytest.mark.parametrize("name", LISTED)
def test_every_listed_gpu_has_the_figures_a_step_needs(name: str) -> None:
    gpu = CATALOGUE.gpu(name)
    for figure in NEEDED:
        found = gpu.figure(figure)
        assert found.value > 0
        assert found.source
        assert found.confidence


def test_figures_are_in_their_units() -> None:
    gpu = CATALOGUE.gpu("H100-SXM")
    assert gpu.flops("bf16") == 989e12
    assert gpu.flops("fp8") == 1979e12
    assert gpu.memory_bandwidth == 3.35e12
    assert gpu.memory_bytes == 80 * 2**30


def test_a_dtype_without_a_unit_runs_on_the_bf16_unit() -> None:
    assert CATALOGUE.gpu("A100-80-SXM").flops("fp8") == 312e12


@pytest.mark.parametrize("name", ["h100_sxm", "H100 SXM", "Nvidia H100 GPU", "h100-80gb"])
def test_aliases(name: str) -> None:
    assert CATALOGUE.gpu(name).name == "H100-SXM"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H20", "H20"), ("NVIDIA H20", "H20"), ("h800", "H800-SXM"), ("NVIDIA-H100-80GB-HBM3", "H100-SXM"),
        ("NVIDIA H200", "H200-SXM"), ("NVIDIA B200", "B200-SXM"), ("b300", "B300-SXM"), ("GB200 NVL72", "GB200"),
        ("AMD Instinct MI300X", "MI300X"), ("AMD_Instinct_MI350X", "MI350X"), ("NVIDIA A100-SXM4-80GB", "A100-80-SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100-40-SXM"), ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("AMD Instinct MI250X", "MI250X"),
    ],
)  # fmt: skip
def test_names_as_drivers_and_people_write_them(name: str, found: str) -> None:
    assert CATALOGUE.gpu(name).name == found


def test_a_pair_in_a_mesh_has_one_link_and_with_a_switch_the_whole_port() -> None:
    mesh, switch = CATALOGUE.gpu("MI300X"), CATALOGUE.gpu("H100-SXM")
    assert mesh.link_bandwidth(1) == 64e9
    assert mesh.link_bandwidth(7) == 448e9
    assert switch.link_bandwidth(1) == switch.link_bandwidth(7) == 450e9


def test_two_gpus_of_a_mesh_reduce_slower_than_eight() -> None:
    pair, all_of_them = (all_reduce(CATALOGUE.gpu("MI300X"), n).seconds(64e6) for n in (2, 8))
    assert pair > 2 * all_of_them


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_reduce_grows_with_the_message(name: str, ranks: int) -> None:
    gpu = CATALOGUE.gpu(name)
    if ranks > gpu.value("gpus_per_node") and "nic_gbit_s" not in gpu.figures:
        with pytest.raises(InputError, match="nic_gbit_s"):
            all_reduce(gpu, ranks)
        return
    line = all_reduce(gpu, ranks)
    sizes = [1e3, 1e5, 1e6, SWITCH_BYTES - 1, SWITCH_BYTES, 1e7, 1e9]
    times = [line.seconds(size) for size in sizes]
    assert times == sorted(times)


def test_measured_all_reduce_is_near_the_table() -> None:
    """H100, 8 ranks, vLLM 0.24 captured: 19.4 us at 1 MiB and 577 us at 64 MiB (aiconfigurator-core 0.12)."""
    line = all_reduce(CATALOGUE.gpu("H100-SXM"), 8)
    assert line.seconds(2**20) == pytest.approx(19.4e-6, rel=0.15)
    assert line.seconds(2**26) == pytest.approx(577e-6, rel=0.15)


def test_missing_figure_names_gpu_and_figure() -> None:
    with pytest.raises(InputError, match=r"MI210.*`fp8_tflops`"):
        CATALOGUE.gpu("MI210").figure("fp8_tflops")


def test_unknown_gpu_is_named() -> None:
    with pytest.raises(InputError, match="unknown GPU 'H900'"):
        CATALOGUE.gpu("H900")


def test_a_users_file_overrides_single_figures_and_adds_gpus(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "gpus:\n"
        "  h100_sxm: {figures: {memory_tb_s: 3.0}}\n"
        "  X1: {vendor: acme, figures: {topology: mesh, bf16_tflops: [100, bench, measured]}}\n"
    )
    catalogue = load_catalogue([own])
    changed = catalogue.gpu("H100-SXM")
    assert changed.value("memory_tb_s") == 3.0
    assert changed.figure("memory_tb_s").source == str(own)
    assert changed.value("bf16_tflops") == 989
    assert catalogue.gpu("x1").figure("bf16_tflops").confidence == "measured"
    assert CATALOGUE.gpu("H100-SXM").value("memory_tb_s") == 3.35


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus: [", "not YAML"),
        ("prices: {}", "expected a mapping with `gpus`"),
        ("gpus: {X: {figures: {topology: mesh}}}", "missing field `vendor`"),
        ("gpus: {X: {vendor: a, figures: {bf16_tflops: 1}}}", "`topology`"),
        ("gpus: {X: {vendor: a, figures: {topology: ring}}}", "'ring'"),
        ("gpus: {H100-SXM: {figures: {memory_tb_s: -1}}}", r"`memory_tb_s` must be a positive number \(TB/s\), got -1"),
        ("gpus: {H100-SXM: {figures: {memory_tb: 1}}}", "unknown figure `memory_tb`"),
        ("gpus: {H100-SXM: {price: 1}}", "unknown field `price`"),
    ],
)
def test_bad_catalogue_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_catalogue([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_every_figure_of_the_catalogue_has_a_unit() -> None:
    for gpu in CATALOGUE.gpus.values():
        assert set(gpu.figures) <= set(UNITS)
