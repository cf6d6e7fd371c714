"""The shapes of `hetkv bench traffic`: what engines move in a step, and the requests that show its order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from hetkv.kv.spec import KVSpec


class Case(NamedTuple):
    """`requests` requests of `tokens` tokens each, of a rank's part of a model."""

    name: str
    layers: int
    heads: int
    """KV heads of the rank; 0: MLA, one latent of 512 channels and one rope of 64."""
    tokens: int
    requests: int = 1
    dtype: str = "bf16"
    reps: int = 10
    kinds: tuple[str, ...] = ("ready", "layers")
    """How its layers become ready: see `KINDS`."""
    last_tokens: int = 0
    """Tokens of the last request, where it has fewer."""

    def tokens_of(self, request: int) -> int:
        """Tokens of one of the requests."""
        return self.last_tokens if self.last_tokens and request == self.requests - 1 else self.tokens

    @property
    def spec(self) -> KVSpec:
        from hetkv.kv.spec import KVSpec, LayerSpec

        if self.heads == 0:
            return KVSpec(tuple(LayerSpec.latent(512, 64) for _ in range(self.layers)))
        return KVSpec.uniform(self.layers, self.heads, HEAD_DIM)

    @property
    def token_bytes(self) -> int:
        """Of one token in one layer."""
        size = 1 if self.dtype == "fp8" else 2
        return size * (2 * self.heads * HEAD_DIM or 576)

    @property
    def block_kib(self) -> float:
        """Of the K, or the V, of a block of 16 tokens in one layer: what a peer gets a descriptor for."""
        return 16 * self.token_bytes / 2 / 1024

    @property
    def layer_bytes(self) -> int:
        """Payload of one layer of one request."""
        return self.tokens * self.token_bytes

    @property
    def payload_bytes(self) -> int:
        """Of all requests, each byte once."""
        return self.layers * self.token_bytes * sum(map(self.tokens_of, range(self.requests)))


HEAD_DIM = 128
KINDS = {
    "ready": "all layers of all requests ready at once, handed over in one call",
    "layers": "a call a layer for all requests, one after the other",
    "order": "all layers of each request ready at once, one request after the other: in which order do they end",
    "latency": "as ready, both sides spinning: engine threads, and the caller that waits",
}

ORDER = (
    Case("8 equal requests, 32 x 8 heads, 512 tokens", 32, 8, 512, 8, reps=5, kinds=("order",)),
    Case("16 tokens after 1 GiB, 32 x 8 heads", 32, 8, 8192, 2, reps=5, kinds=("order",), last_tokens=16),
)

DEVICE = (
    Case("80 x 8 heads, 16k tokens", 80, 8, 16384, reps=10),
    Case("80 x 8 heads, 4k tokens", 80, 8, 4096, reps=15),
    Case("80 x 8 heads, 1k tokens", 80, 8, 1024, reps=15),
    Case("80 x 1 head, 1k tokens", 80, 1, 1024, reps=20),
    Case("80 x 1 head, 1k tokens, 8 requests", 80, 1, 1024, 8),
    Case("80 x 1 head, 1k tokens, 32 requests", 80, 1, 1024, 32),
    Case("80 x 1 head, 256 tokens", 80, 1, 256, reps=20),
    Case("80 x 1 head, 256 tokens, 64 requests", 80, 1, 256, 64),
    Case("32 x 8 heads, 128 tokens, 8 requests", 32, 8, 128, 8),
    Case("32 x 8 heads, 128 tokens, 64 requests", 32, 8, 128, 64),
    Case("61 x MLA, 1k tokens, 8 requests", 61, 0, 1024, 8),
    Case("61 x MLA, 1k tokens, 64 requests", 61, 0, 1024, 64),
    Case("80 x 1 head, 1k tokens, 32 requests, fp8", 80, 1, 1024, 32, "fp8"),
    Case("1 layer x 8 heads, 16 tokens", 1, 8, 16, reps=200, kinds=("latency",)),
    Case("32 layers x 8 heads, 1 token", 32, 8, 1, reps=200, kinds=("latency", "layers")),
    *ORDER,
)
CPU = (
    Case("32 x 8 heads, 4k tokens", 32, 8, 4096, reps=5),
    Case("32 x 8 heads, 128 tokens, 32 requests", 32, 8, 128, 32, reps=5),
    Case("80 x 1 head, 1k tokens", 80, 1, 1024),
    Case("80 x 1 head, 1k tokens, 8 requests", 80, 1, 1024, 8, reps=5),
    Case("80 x 1 head, 16 tokens, 64 requests", 80, 1, 16, 64, reps=5),
    Case("80 x 1 head, 16 tokens, 1000 requests", 80, 1, 16, 1000, reps=3, kinds=("ready",)),
    Case("61 x MLA, 256 tokens, 8 requests", 61, 0, 256, 8, reps=5),
    Case("80 x 1 head, 1k tokens, 8 requests, fp8", 80, 1, 1024, 8, "fp8", reps=5),
    Case("1 layer x 8 heads, 16 tokens", 1, 8, 16, reps=200, kinds=("latency",)),
    Case("32 layers x 8 heads, 1 token", 32, 8, 1, reps=200, kinds=("latency", "layers")),
    *ORDER,
)


def rivals(report: dict[str, Any]) -> dict[tuple[str, str], float]:
    """By a row's name and dtype: NIXL's best GB/s at layers and blocks of its size, where that was measured."""
    best = {(row["layer_bytes"], row["block_kib"]): row["gb_s"] for row in report["nixl"] if row.get("gb_s")}
    cases = [case for case in (*DEVICE, *CPU) if "latency" not in case.kinds]
    shapes = {(case.name, case.dtype): (case.layer_bytes, case.block_kib) for case in cases}
    return {name: best[shape] for name, shape in shapes.items() if shape in best}
