"""The ranks of one instance and what they exchange: `ParallelGroup`, over `torch.distributed`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hetkv.errors import PeerLostError


class ParallelGroup:
    """One rank's place among `tp * pp` ranks; rank `pp_rank * tp + tp_rank` is the order of `Shard`s and addresses.

    `ParallelGroup()` is a rank alone: it sends nothing. Calls are collective: the ranks they name make them in the same
    order. They raise `PeerLostError` when one of these has gone.
    """

    def __init__(self, tp: int = 1, pp: int = 1, rank: int = 0, device: torch.device | str = "cpu") -> None:
        self.tp, self.pp, self.rank = tp, pp, rank
        self.device = torch.device(device)
        self._stage: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, address: str, tp: int, pp: int, rank: int, device: torch.device | str = "cpu") -> ParallelGroup:
        """Meet the other ranks at `address` (an `init_method`: `file:///...`, `tcp://host:port`). One group a process.

        NCCL (RCCL on AMD) between GPUs, gloo between CPUs.
        """
        made = cls(tp, pp, rank, device)
        if tp * pp > 1:
            backend = "nccl" if made.device.type == "cuda" else "gloo"
            with made._talking():
                dist.init_process_group(backend, init_method=address, world_size=tp * pp, rank=rank)
                # Every rank makes every stage's group: that is how `new_group` wants it.
                groups = [dist.new_group(range(stage * tp, (stage + 1) * tp)) for stage in range(pp)]
            made._stage = groups[rank // tp]
        return made

    def leave(self) -> None:
        """End this rank's membership."""
        if self._stage is not None:
            self._stage = None
            dist.destroy_process_group()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of the stage; in place."""
        if self.tp > 1:
            with self._talking():
                dist.all_reduce(x, group=self._stage)
        return x

    def concat(self, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Join the last axis over the ranks of the stage, where rank `r` has `sizes[r]` of it."""
        if self.tp == 1:
            return x
        widest = max(sizes)
        parts = [x.new_empty(*x.shape[:-1], widest) for _ in sizes]
        with self._talking():
            dist.all_gather(parts, F.pad(x, (0, widest - x.shape[-1])), group=self._stage)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def send(self, x: torch.Tensor) -> None:
        """Give hidden states to the next stage's rank of the same number (all ranks of a stage have the same ones)."""
        with self._talking():
            dist.send(x.contiguous(), self.rank + self.tp)

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What the previous stage sent."""
        x = torch.empty(*shape, dtype=dtype, device=self.device)
        with self._talking():
            dist.recv(x, self.rank - self.tp)
        return x

    def agree(self, token: int | None) -> int:
        """The token that the last stage's first rank chose, on every rank of the group."""
        if self._stage is None:
            assert token is not None
            return token
        said = torch.tensor([token or 0], device=self.device)
        with self._talking():
            dist.broadcast(said, (self.pp - 1) * self.tp)
        return int(said)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PeerLostError(f"rank {self.rank}: a rank of the same instance does not answer ({reason})") from error
