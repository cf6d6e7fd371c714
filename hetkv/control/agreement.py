"""What two ranks agree on at the handshake: `Agreement`, made once and kept with the connection."""

from __future__ import annotations

from typing import NamedTuple

from hetkv.control import compat
from hetkv.control.compat import layer_conversions, shard_text
from hetkv.control.conversion import Conversion
from hetkv.control.description import Description
from hetkv.errors import IncompatibleError, InputError
from hetkv.kv.reshard import Route, overlap, routes


class LayerRoute(NamedTuple):
    """One layer of a route, and how each of its segments travels, in the spec's order."""

    layer: int
    route: Route
    conversions: dict[str, Conversion]


class Agreement(NamedTuple):
    """Routes between exactly these two ranks, computed from all ranks of both instances, and their conversions."""

    mine: Description
    theirs: Description
    minor: int
    """Version of the link: the lower one of the two sides."""
    layers: tuple[LayerRoute, ...]
    """In rising layer order; empty where replicas share the work so that nothing is left for this pair."""
    ranks: tuple[int, ...]
    """Ranks of the peer's instance that hold something this rank holds too: a request involves a link to each."""

    @property
    def cipher(self) -> str:
        """Of streams that leave the host; empty: neither side asks for one."""
        return compat.cipher(self.mine, self.theirs)

    @property
    def sends(self) -> bool:
        """This side is the sender."""
        return self.mine.role == "sender"

    @classmethod
    def of(cls, mine: Description, theirs: Description, minor: int) -> Agreement:
        """Raises `IncompatibleError` with the first field that keeps two ranks from exchanging KV, and both values."""
        compat.check(mine, theirs, minor)
        sender, receiver = (mine, theirs) if mine.role == "sender" else (theirs, mine)
        try:
            between = routes(mine.spec, sender.shards, receiver.shards)
        except InputError as error:
            raise _incomplete(mine, theirs, sender, str(error)) from None
        layers = [
            LayerRoute(layer, route, layer_conversions(sender, receiver, layer, route.heads))
            for route in between
            if (route.source, route.destination) == (sender.rank, receiver.rank)
            for layer in range(*route.layers)
        ]
        ranks = (rank for rank, shard in enumerate(theirs.shards) if any(overlap(mine.spec, mine.shard, shard)))
        return cls(mine, theirs, minor, tuple(sorted(layers, key=lambda at: at.layer)), tuple(ranks))


def _incomplete(mine: Description, theirs: Description, sender: Description, why: str) -> IncompatibleError:
    """The sender's instance lacks what a rank of the receiver's needs, most often because its ranks were not named."""
    alone = not sender.instance_shards
    field = "instance_shards" if alone else "shard"
    advice = (
        "give tp and pp, or instance_shards, to every rank of the sending instance" if alone else "ranks are missing"
    )
    return IncompatibleError(field, shard_text(mine), shard_text(theirs), f"{why}: {advice}")
