"""Named pairs of different TP and PP: real processes for every rank generate what `transformers` generates in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM
from transformers import PreTrainedModel as Model

from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.transport.config import TransferConfig
from tests.runtime.deployment_cases import moved
from tests.runtime.test_runtime import reference

BASE = {"vocab_size": 197, "intermediate_size": 70, "max_position_embeddings": 512, "eos_token_id": None}
TOKENS = 24


class Side(NamedTuple):
    tp: int
    pp: int = 1
    stages: tuple[int, ...] | None = None
    layout: str = "nhd"
    block_size: int = 16


class Case(NamedTuple):
    model: type[Model]
    geometry: dict[str, object]
    prefill: Side
    decode: Side
    chunk: int | None = None


def heads(query: int, kv: int, layers: int, **more: object) -> dict[str, object]:
    return {
        "num_attention_heads": query, "num_key_value_heads": kv, "head_dim": 16, "hidden_size": 16 * query,
        "num_hidden_layers": layers, **more,
    }  # fmt: skip


CASES = {
    "TP 3 -> TP 2": Case(LlamaForCausalLM, heads(6, 3, 2), Side(3), Side(2, layout="rocm", block_size=64)),
    "TP 1 x PP 3 -> TP 4 x PP 1": Case(
        LlamaForCausalLM, heads(8, 4, 5), Side(1, 3, (1, 3, 1)), Side(4, layout="hnd", block_size=1), chunk=13
    ),
    "GQA of 2 KV heads, TP 4 -> TP 1": Case(
        Qwen2ForCausalLM, heads(8, 2, 2), Side(4, layout="packed_nhd"), Side(1, layout="rocm", block_size=64)
    ),
    "sliding window, TP 2 -> TP 3": Case(
        MistralForCausalLM, heads(6, 3, 2, sliding_window=19), Side(2, layout="hnd"), Side(3, block_size=64), chunk=20
    ),
    "mixed windows, TP 2 x PP 2 -> TP 1": Case(
        Qwen2ForCausalLM,
        heads(4, 2, 3, use_sliding_window=True, sliding_window=21, max_window_layers=1),
        Side(2, 2, (1, 2)),
        Side(1, layout="nhd_interleaved", block_size=4),
    ),
    "7 heads, TP 2 -> TP 3 x PP 2": Case(
        LlamaForCausalLM, heads(7, 7, 3), Side(2, layout="hnd_interleaved"), Side(3, 2, layout="rocm"), chunk=31
    ),
}


def make(case: Case, directory: Path) -> Model:
    """A random model whose tokens depend on everything that was moved."""
    torch.manual_seed(len(str(case)))
    model = case.model(case.model.config_class(**BASE, **case.geometry)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 2.0 / parameter.shape[1] ** 0.5
            parameter.normal_(float("norm" in name), spread)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("slot_bytes", [1 << 20, pytest.param(1 << 12, marks=pytest.mark.slow)], ids=["wide", "narrow"])
def test_named_pair_equals_transformers(name: str, slot_bytes: int, tmp_path: Path) -> None:
    case = CASES[name]
    model = make(case, tmp_path)
    prompts = [torch.randint(197, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 61)]
    wanted = [reference(model, prompt, TOKENS) for prompt in prompts]
    assert len(set(wanted[1])) > 10, "a stuck model shows nothing"
    plans = [
        InstancePlan(
            name=f"{role}-0", role=role, tp=side.tp, pp=side.pp, stages=side.stages,
            pool=SideOptions(block_size=side.block_size, layout=side.layout, dtype="float32"),
        )
        for role, side in (("prefill", case.prefill), ("decode", case.decode))
    ]  # fmt: skip
    assert moved(plans, tmp_path, prompts, TOKENS, case.chunk, TransferConfig(slot_bytes=slot_bytes)) == wanted
