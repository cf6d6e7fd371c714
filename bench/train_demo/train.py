"""Trains the demo checkpoint: a small Llama-family model and its tokenizer on the King James Bible, on one CPU core.

    apt-get install bible-kjv bible-kjv-text
    OMP_NUM_THREADS=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
      python bench/train_demo/train.py --out hetkv/runtime/data/demo --compile

Matrix products run in bf16 (quick on a core with AMX), weights and optimizer states are fp32, the saved weights are
bf16. Three steps in four read short windows, because attention's backward pass is the slow part on a CPU; the fourth
reads whole contexts, so that all positions are trained. The run is seeded.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from text import hold_out, read_verses, split_chapters
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BOS, EOS = "<s>", "</s>"
HELD_OUT_EVERY = 50
CONTEXT = 1024
SHORT = 256


def bf16_attention(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, **options: object
) -> tuple[torch.Tensor, None]:
    """Causal attention with bf16 operands: RoPE leaves q and k in fp32, which autocast keeps."""
    k, v = (t.bfloat16().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q.bfloat16(), k, v, is_causal=True).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("bf16_causal", bf16_attention)


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; every text is encoded with a leading BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """All texts as one int64 stream, each `<s> ... </s>`."""
    eos = tokenizer.token_to_id(EOS)
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text).ids, eos]
    return torch.tensor(ids)


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        attn_implementation="bf16_causal",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the gains; both take the same learning rate."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() < 2 or "layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def mean_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of predicting batch[:, 1:] from batch[:, :-1]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def sample(stream: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[count, length + 1] windows at random places of the stream."""
    starts = torch.randint(len(stream) - length - 1, (count,), generator=generator)
    return torch.stack([stream[start : start + length + 1] for start in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: torch.Tensor, length: int) -> float:
    """Mean loss over the held-out stream, in whole windows of `length` tokens."""
    windows = stream[: (len(stream) - 1) // length * length + 1].unfold(0, length + 1, length)
    return sum(mean_loss(model, window[None]).item() for window in windows) / len(windows)


def rate(progress: float, step: int, warmup: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine from 1 to 0.02."""
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, facts: dict[str, object]) -> None:
    """Writes config.json, generation_config.json, model.safetensors (bf16), tokenizer files, training.json."""
    out.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.config.use_cache = True
    copy.to(torch.bfloat16).save_pretrained(out)
    model.config.use_cache = False
    ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    special = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file of `Book1:1 words` lines (default: ask the `bible` command)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--minutes", type=float, default=60.0, help="the schedule ends here if the steps take longer")
    parser.add_argument("--batch", type=int, default=4096, help="tokens a step, in parts of 1024")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    training, held_out = hold_out(split_chapters(read_verses(args.text)), HELD_OUT_EVERY)
    tokenizer = train_tokenizer([text for _, text in training], args.vocab)
    stream = encode(tokenizer, [text for _, text in training])
    test = encode(tokenizer, [text for _, text in held_out])
    model = make_model(tokenizer)
    step_model = torch.compile(model, dynamic=False) if args.compile else model
    optimizers = make_optimizers(model, args.lr)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(stream)} training tokens, {len(test)} held-out tokens", flush=True)

    generator = torch.Generator().manual_seed(args.seed)
    begin = time.monotonic()
    step, progress, recent = 0, 0.0, 0.0
    while progress < 1.0:
        factor = rate(progress, step, warmup=100)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
        length = CONTEXT if step % 4 == 3 else SHORT
        parts = args.batch // CONTEXT
        total = 0.0
        for _ in range(parts):
            batch = sample(stream, CONTEXT // length, length, generator)
            loss = mean_loss(step_model, batch) / parts
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        minutes = (time.monotonic() - begin) / 60
        progress = max(step / args.steps, minutes / args.minutes)
        recent = total if step == 1 else 0.98 * recent + 0.02 * total
        if step % 20 == 0:
            print(f"step {step} loss {recent:.3f} lr {args.lr * factor:.2e} {minutes:.1f} min", flush=True)
        if step % args.save_every == 0 or progress >= 1.0:
            tested = held_out_loss(model, test, CONTEXT)
            facts = {
                "text": f"King James Bible, every {HELD_OUT_EVERY}th chapter held out",
                "parameters": parameters,
                "training_tokens": len(stream),
                "held_out_tokens": len(test),
                "steps": step,
                "tokens_seen": step * args.batch,
                "tokens_a_step": args.batch,
                "lr": args.lr,
                "seed": args.seed,
                "minutes": round(minutes, 1),
                "train_loss": round(recent, 4),
                "held_out_loss": round(tested, 4),
                "held_out_perplexity": round(math.exp(tested), 2),
                "torch": torch.__version__,
            }
            save(model, tokenizer, args.out, facts)
            print(f"saved at step {step}: held-out loss {tested:.4f}", flush=True)


if __name__ == "__main__":
    main()
