"""Greedy tokens equal those of `transformers`: the demo checkpoint and random models, every layout and block size."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.runtime import BlockAllocator, Decoder, Pages, Span, TextTokenizer, decode, generate, greedy, prefill

DEMO = Path(__file__).parents[2] / "hetkv" / "runtime" / "data" / "demo"
LAYOUTS = ["nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm"]
BLOCK_SIZES = [1, 16, 64, 128]
NEW_TOKENS = 200
PROMPTS = [
    "And it came to pass in those days, that",
    "The words of the wise man, which he spake unto his son in the day of trouble:\nMy son, hear",
    "Now there was a certain man in the city, whose name was Jonathan; and he had two sons and a daughter.\n"
    "And the elder said unto his father, Give me, I pray thee, the field by the river.\nAnd his father answered",
]

SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
RANDOM_MODELS: dict[str, tuple[type[PreTrainedModel], object]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            **SMALL, num_attention_heads=6, num_key_value_heads=3, head_dim=16, attention_bias=True, mlp_bias=True
        ),
    ),
    "llama-3-rope": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, num_attention_heads=3, num_key_value_heads=1, head_dim=32, rope_parameters=LLAMA3),
    ),
    "llama-linear-rope": (
        LlamaForCausalLM,
        LlamaConfig(
            **SMALL,
            num_attention_heads=3,
            head_dim=16,
            rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        ),
    ),
    "mistral-sliding": (
        MistralForCausalLM,
        MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=23),
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**SMALL, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True),
    ),
    "qwen2-mixed-windows": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **SMALL,
            num_attention_heads=3,
            num_key_value_heads=3,
            use_sliding_window=True,
            sliding_window=19,
            max_window_layers=1,
        ),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, num_attention_heads=5, num_key_value_heads=5, head_dim=24)),
}


def reference(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by `transformers`, not stopped by an end token."""
    inputs = torch.tensor([prompt])
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def save_random(name: str, directory: Path, **options: object) -> PreTrainedModel:
    """A random model whose every parameter counts: gains differ from one, biases from zero."""
    kind, config = RANDOM_MODELS[name]
    torch.manual_seed(len(name))
    model = kind(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 2.0 / parameter.shape[1] ** 0.5
            parameter.normal_(float("norm" in parameter_name), spread)
    model.save_pretrained(directory, **options)
    return model


def generate_together(model: Decoder, prompts: list[list[int]], count: int, pools: list[KVPool]) -> list[list[int]]:
    """Greedy continuation of each prompt in the pool of the same index, decoded as one ragged batch."""
    pages = []
    for prompt, pool in zip(prompts, pools, strict=True):
        size = pool.layers[0].layout.block_size
        blocks = torch.randperm(pool.layers[0].num_blocks).tolist()
        pages.append(Pages(pool, [blocks[: -(-(len(prompt) + count) // size)]]))
    out = [[greedy(prefill(model, prompt, p))] for prompt, p in zip(prompts, pages, strict=True)]
    for step in range(count - 1):
        spans = [Span(p, len(prompt) + step, new[-1:]) for p, prompt, new in zip(pages, prompts, out, strict=True)]
        for new, logits in zip(out, model.forward(spans), strict=True):
            new.append(greedy(logits))
    return out


@pytest.fixture(scope="module")
def demo() -> Decoder:
    return Decoder.load(DEMO)


@pytest.fixture(scope="module")
def demo_prompts() -> list[list[int]]:
    tokenizer = TextTokenizer.load(DEMO)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def demo_reference(demo_prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    return [reference(model, prompt, NEW_TOKENS) for prompt in demo_prompts]


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, len(PROMPTS)))])
def test_demo_checkpoint_equals_transformers(
    turn: int, demo: Decoder, demo_prompts: list[list[int]], demo_reference: list[list[int]]
) -> None:
    """Every layout with every block size, prompts in turn: sequences in different pools share one batch."""
    cases = list(product(LAYOUTS, BLOCK_SIZES))
    turns = [(index + turn) % len(PROMPTS) for index in range(len(cases))]
    pools = [
        KVPool.allocate(demo.kv_spec, 2 + 400 // size, layout=layout, block_size=size, dtype="float32")
        for layout, size in cases
    ]
    generated = generate_together(demo, [demo_prompts[prompt] for prompt in turns], NEW_TOKENS, pools)
    wrong = [case for case, prompt, out in zip(cases, turns, generated, strict=True) if out != demo_reference[prompt]]
    assert wrong == []


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_model_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = save_random(name, tmp_path)
    ours = Decoder.load(tmp_path)
    generator = torch.Generator().manual_seed(7)
    for length, layout, block_size in ((1, "hnd", 16), (37, "packed_nhd", 64), (90, "rocm", 1)):
        prompt = torch.randint(SMALL["vocab_size"], (length,), generator=generator).tolist()
        pool = KVPool.allocate(
            ours.kv_spec, 1 + 300 // block_size, layout=layout, block_size=block_size, dtype="float32"
        )
        wanted = reference(theirs, prompt, NEW_TOKENS)
        assert len(set(wanted)) > 20, "a stuck model shows nothing"
        assert generate(ours, prompt, NEW_TOKENS, pool) == wanted
        assert generate(ours, prompt, 40, pool, chunk=10) == wanted[:40]


def test_logits_equal_transformers(tmp_path: Path) -> None:
    theirs = save_random("qwen3", tmp_path)
    ours = Decoder.load(tmp_path)
    pool = KVPool.allocate(ours.kv_spec, 8, dtype="float32")
    pages = Pages(pool, [[5, 2, 7, 0]])
    tokens = list(range(50))
    torch.testing.assert_close(
        prefill(ours, tokens, pages), theirs(torch.tensor([tokens])).logits[0, -1].detach(), rtol=1e-4, atol=1e-4
    )


def test_sharded_checkpoint_and_old_config_fields(tmp_path: Path) -> None:
    theirs = save_random("llama-3-rope", tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    path.write_text(json.dumps(config))
    ours = Decoder.load(tmp_path)
    pool = KVPool.allocate(ours.kv_spec, 20, dtype="float32")
    assert generate(ours, [3, 1, 4, 1, 5], 100, pool) == reference(theirs, [3, 1, 4, 1, 5], 100)


def test_mixed_windows_are_two_cache_groups(tmp_path: Path) -> None:
    save_random("qwen2-mixed-windows", tmp_path)
    spec = Decoder.load(tmp_path).kv_spec
    assert [(layer.group, layer.sliding_window) for layer in spec.layers] == [(0, None), (1, 19)]


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunked_prefill_equals_whole(chunk: int, demo: Decoder, demo_prompts: list[list[int]]) -> None:
    prompt = demo_prompts[2]
    pools = [KVPool.allocate(demo.kv_spec, 20, layout="rocm", block_size=16, dtype="float32") for _ in range(2)]
    blocks = [[9, 3, 17, 0, 12]]
    whole = prefill(demo, prompt, Pages(pools[0], blocks))
    parts: list[tuple[int, int, int]] = []
    chunked = prefill(demo, prompt, Pages(pools[1], blocks), chunk=chunk, on_layer=lambda *part: parts.append(part))
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-4)
    for layer in range(demo.config.num_layers):
        spans = [(start, stop) for index, start, stop in parts if index == layer]
        assert [token for span in spans for token in range(*span)] == list(range(len(prompt)))
        for segment in ("k", "v"):
            torch.testing.assert_close(
                pools[1].view(layer, segment), pools[0].view(layer, segment), rtol=1e-4, atol=1e-4
            )


def test_cached_prefix_is_not_computed_again(demo: Decoder, demo_prompts: list[list[int]]) -> None:
    prompt = demo_prompts[1]
    pages = Pages(KVPool.allocate(demo.kv_spec, 8, dtype="float32"), [[1, 4, 6]])
    whole = prefill(demo, prompt, pages)
    computed: list[tuple[int, int, int]] = []
    again = prefill(demo, prompt, pages, start=16, on_layer=lambda *part: computed.append(part))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-4)
    assert computed == [(layer, 16, len(prompt)) for layer in range(demo.config.num_layers)]


def test_on_layer_comes_when_that_layer_is_in_the_pool(demo: Decoder, demo_prompts: list[list[int]]) -> None:
    prompt = demo_prompts[0]
    pool = KVPool.allocate(demo.kv_spec, 4, layout="hnd", block_size=16, dtype="bfloat16")
    pages = Pages(pool, [[2]])
    written: list[list[bool]] = []

    def look(layer: int) -> None:
        assert layer == len(written)
        rows = [pool.view(i, "v")[2, : len(prompt)] for i in range(demo.config.num_layers)]
        written.append([bool(row.any(-1).all()) for row in rows])

    demo.prefill(prompt, 0, pages, look)
    assert written == [[i <= layer for i in range(demo.config.num_layers)] for layer in range(demo.config.num_layers)]


def test_decode_continues_in_another_pool(
    demo: Decoder, demo_prompts: list[list[int]], demo_reference: list[list[int]]
) -> None:
    """What two workers do: prefill into one pool, move the values, decode from the first token in another."""
    prompt, wanted = demo_prompts[2], demo_reference[2][:40]
    source = KVPool.allocate(demo.kv_spec, 20, layout="nhd", block_size=16, dtype="float32")
    target = KVPool.allocate(demo.kv_spec, 9, layout="rocm", block_size=64, dtype="float32")
    there, here = Pages(source, [[11, 2, 7, 5]]), Pages(target, [[8, 0]])
    first = greedy(prefill(demo, prompt, there))
    for layer in range(demo.config.num_layers):
        here.write(layer, 0, *there.read(layer, len(prompt), torch.float32))
    assert list(decode(demo, first, len(prompt), here, 40, eos_ids=())) == wanted


def test_generation_stops_at_an_end_token(
    demo: Decoder, demo_prompts: list[list[int]], demo_reference: list[list[int]]
) -> None:
    pool = KVPool.allocate(demo.kv_spec, 20, dtype="float32")
    end = demo_reference[0][9]
    first = demo_reference[0].index(end)
    allocator = BlockAllocator(pool)
    out = generate(demo, demo_prompts[0], 50, pool, allocator=allocator, eos_ids=[end])
    assert out == demo_reference[0][: first + 1]
    assert allocator.free_blocks() == 20, "blocks go back"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_prefill_is_close(name: str, demo: Decoder, demo_prompts: list[list[int]]) -> None:
    dtype = getattr(torch, name)
    half = Decoder.load(DEMO, dtype)
    exact = prefill(demo, demo_prompts[2], Pages(KVPool.allocate(demo.kv_spec, 9, dtype="float32"), [list(range(9))]))
    close = prefill(half, demo_prompts[2], Pages(KVPool.allocate(demo.kv_spec, 9, dtype=name), [list(range(9))]))
    assert close.dtype == dtype
    assert torch.nn.functional.cosine_similarity(close.float(), exact, dim=0) > 0.999


def test_rejected_inputs_write_nothing(demo: Decoder) -> None:
    pool = KVPool.allocate(demo.kv_spec, 80, dtype="float32")
    pages = Pages(pool, [[0, 1]])
    foreign = KVPool.allocate(type(demo.kv_spec)(demo.kv_spec.layers[:-1]), 2, dtype="float32")
    cases = [
        (pages, 0, [1, demo.config.vocab_size], "token id 3072 is outside the vocabulary"),
        (pages, 0, [1, -1], "token id -1"),
        (pages, 0, [], "a span of 0 tokens"),
        (pages, -1, [1], "from position -1"),
        (pages, 30, [1, 2, 3], "position 32 is beyond the 32 tokens"),
        (Pages(pool, [list(range(80))]), 1023, [1, 2], "position 1024 is beyond the model's context of 1024"),
        (Pages(foreign, [[0, 1]]), 0, [1], "KV spec differs"),
    ]
    for place, start, tokens, message in cases:
        with pytest.raises(InputError, match=message):
            demo.prefill(tokens, start, place)
    assert not any(pool.view(layer, "k").any() for layer in range(demo.config.num_layers))
    with pytest.raises(InputError, match="cannot be computed from token 2"):
        prefill(demo, [1, 2], pages, start=2)
    with pytest.raises(InputError, match="chunk of 0"):
        prefill(demo, [1, 2], pages, chunk=0)
    with pytest.raises(InputError, match="both must be at least 1"):
        generate(demo, [], 5, pool)
