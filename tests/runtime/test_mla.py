"""DeepSeek-V2 equals `transformers` token for token, through transfers of the latent cache between different pools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.runtime import BlockAllocator, Decoder, Pages, Span, decode, generate, greedy, prefill
from hetkv.runtime.batch import Batch
from hetkv.runtime.mla import LatentAttention
from hetkv.runtime.part import Part
from hetkv.runtime.rope import Rotation
from hetkv.runtime.tensors import expected_tensors
from hetkv.runtime.weights import load_weights
from hetkv.transport.sender import SendHandle
from tests.runtime.test_runtime import reference
from tests.transport.peers import WAIT_S, connected

NEW_TOKENS = 110
SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
MODELS = {
    # The real latent of DeepSeek-V2 and V3, queries projected directly, YaRN with two temperatures, as V2-Lite has.
    "lite": DeepseekV2Config(
        **SMALL, kv_lora_rank=512, qk_rope_head_dim=64, q_lora_rank=None, rope_parameters=YARN, n_group=1, topk_group=1
    ),
    # Compressed queries, grouped gating, scaled experts, biases: as V2 has.
    "full": DeepseekV2Config(
        **SMALL,
        kv_lora_rank=40,
        qk_rope_head_dim=8,
        q_lora_rank=28,
        attention_bias=True,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, DeepseekV2ForCausalLM]]:
    """Random models whose every parameter counts: gains differ from one, biases from zero, gates are decided."""
    made = {}
    for name, config in MODELS.items():
        torch.manual_seed(len(name))
        model = DeepseekV2ForCausalLM(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                spread = 0.3 if parameter.dim() == 1 else 2.0 / parameter.shape[-1] ** 0.5
                parameter.normal_(float("norm" in key), spread)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        made[name] = directory, model
    return made


def prompt_of(count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sizes", "chunk"), [((16, 64), None), ((7, 1), 13)])
def test_tokens_through_a_transfer(
    name: str, sizes: tuple[int, int], chunk: int | None, checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]]
) -> None:
    directory, truth = checkpoints[name]
    model, prompt = Decoder.load(directory), prompt_of(53)
    pools = [KVPool.allocate(model.kv_spec, -(-200 // size), block_size=size, dtype="float32") for size in sizes]
    assert {memory.layout.name for memory in pools[0].layers.values()} == {"latent"}
    tables = [
        [torch.randperm(pool.cache_groups[0][1], generator=torch.Generator().manual_seed(1)).tolist()] for pool in pools
    ]
    with connected(pools[:1], pools[1:]) as ([sender], [receiver]):
        receiving = receiver.receive("mla", tables[1], len(prompt))
        sending: SendHandle = sender.send("mla", tables[0], len(prompt))
        logits = prefill(
            model, prompt, Pages(pools[0], tables[0]), chunk=chunk,
            on_layer=lambda layer, start, stop: sending.send_layer(layer, (start, stop)),
        )  # fmt: skip
        receiving.wait(WAIT_S)
        sending.wait(WAIT_S)
        mla = truth.config
        token_bytes = 4 * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        assert sender.stats()["payload_bytes"] == mla.num_hidden_layers * len(prompt) * token_bytes
    tokens = list(decode(model, greedy(logits), len(prompt), Pages(pools[1], tables[1]), NEW_TOKENS))
    assert tokens == reference(truth, prompt, NEW_TOKENS)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_ragged_batches(name: str, checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]]) -> None:
    directory, truth = checkpoints[name]
    model = Decoder.load(directory)
    prompts = [prompt_of(count) for count in (1, 34, 150)]
    pools = [KVPool.allocate(model.kv_spec, 200, block_size=size, dtype="float32") for size in (1, 3, 16)]
    pages = [Pages(pool, [list(range(pool.cache_groups[0][1]))]) for pool in pools]
    got = model.forward([Span(place, 0, prompt) for place, prompt in zip(pages, prompts, strict=True)])
    with torch.no_grad():
        want = torch.stack([truth(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_ranks_add_up(name: str, tp: int, checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]]) -> None:
    """Query heads and inner channels are shared by the ranks (6 heads over 4), the latent is the same on all."""
    directory, _ = checkpoints[name]
    whole = Decoder.load(directory)
    assert isinstance(whole.layers[0].attention, LatentAttention)
    weights = load_weights(directory, whole.config, torch.float32)
    prompt, hidden = prompt_of(21), torch.randn(21, 48, generator=torch.Generator().manual_seed(3))

    def outputs(model: Decoder, index: int, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool = KVPool.allocate(model.kv_spec, 4, dtype="float32")
        span = Span(Pages(pool, [[2, 0]]), 0, prompt)
        dim = model.config.latent.rope_dim
        angles = torch.arange(21.0)[:, None, None] / torch.arange(1.0, dim + 1)
        layer = model.layers[index]
        q, latent, key = layer.attention.project(hidden, Rotation(angles.cos(), angles.sin(), True))
        span.pages.write(index, 0, latent, key)
        output = layer.attention.output if bias else layer.attention.output._replace(bias=None)
        memory = pool.layers[index].tensors["latent"].clone()
        return output(layer.attention.attend(Batch([span]), q)), layer.mlp(hidden), memory

    parts_of = [Part.of(whole.config, tp, rank) for rank in range(tp)]
    cuts = [load_weights(directory, whole.config, torch.float32, part=part) for part in parts_of]
    ranks = [Decoder(whole.config, cut, part) for cut, part in zip(cuts, parts_of, strict=True)]
    for index in (0, 2):
        attention, mlp, cache = outputs(whole, index, True)
        parts = [outputs(model, index, rank == 0) for rank, model in enumerate(ranks)]
        torch.testing.assert_close(sum(part[0] for part in parts), attention, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sum(part[1] for part in parts), mlp, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(part[2], cache) for part in parts), "the cache is one latent, whole on every rank"
    kept = [sum(tensor.numel() for tensor in cut.values()) for cut in cuts]
    assert max(kept) < sum(tensor.numel() for tensor in weights.values())


def test_generate_in_one_process(checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]]) -> None:
    directory, truth = checkpoints["full"]
    model = Decoder.load(directory)
    pool = KVPool.allocate(model.kv_spec, 12, dtype="float32")
    allocator = BlockAllocator(pool)
    assert generate(model, prompt_of(9), 30, pool, allocator=allocator, chunk=4) == reference(truth, prompt_of(9), 30)
    assert allocator.free_blocks() == 12


def edit(directory: Path, target: Path, **fields: object) -> Path:
    config = json.loads((directory / "config.json").read_text())
    config.update(fields)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_topk_prob": True}, "`norm_topk_prob` true"),
        ({"topk_method": "noaux_tc"}, "topk_method"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"moe_layer_freq": 2}, "`moe_layer_freq` 2"),
        ({"kv_lora_rank": 0}, "`kv_lora_rank` is 0"),
        ({"qk_rope_head_dim": 7, "qk_head_dim": 23}, "`head_dim` 8 is none of the dims of its latent attention"),
        ({"num_experts_per_tok": None}, "`num_experts_per_tok` is null"),
        ({"num_experts_per_tok": 9}, "exceeds the 8 experts"),
        ({"n_group": 3}, "out of 2 of 3 groups"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "missing field `factor`"),
    ],
)
def test_configs_that_are_rejected(
    fields: dict[str, object], message: str, tmp_path: Path, checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]]
) -> None:
    with pytest.raises(InputError, match=message) as error:
        Decoder.load(edit(checkpoints["full"][0], tmp_path, **fields))
    assert "config.json" in str(error.value)


def test_wrong_shapes_are_named(tmp_path: Path, checkpoints: dict[str, tuple[Path, DeepseekV2ForCausalLM]]) -> None:
    directory, _ = checkpoints["lite"]
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(
        InputError, match=r"kv_b_proj\.weight' has shape \[240, 512\], config.json asks for \[246, 512\]"
    ):
        Decoder.load(edit(directory, tmp_path, v_head_dim=25))
    with pytest.raises(InputError, match=r"experts\.8\.gate_proj\.weight'.* missing"):
        Decoder.load(edit(directory, tmp_path, n_routed_experts=9))
    config = Decoder.load(directory).config
    assert len(expected_tensors(config)) == 3 + 3 * 2 + 3 * 5 + 3 + 2 * (1 + 3 + 8 * 3)
