"""A deployment at work: routes arrivals, hands KV from prefill to decode instances, survives failures."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from hetkv.simulator.events import Events
from hetkv.simulator.instance import Instance
from hetkv.simulator.kv_links import Flow, Links
from hetkv.simulator.pool import DECODE, PREFILL, Pool
from hetkv.simulator.records import Records
from hetkv.simulator.request import FAILED, FINISHED, REJECTED, Request
from hetkv.simulator.router import Router


class Cluster:
    """Owns the instances of all `pools`. `links` is None where nothing is disaggregated.

    With `overlap` a request's decode instance is chosen when its prefill starts, and the KV follows each step layer by
    layer; without, when its prefill ends. `restart` False fails the requests of a failed instance instead of computing
    them again.
    """

    def __init__(
        self,
        pools: list[Pool],
        events: Events,
        records: Records,
        links: Links | None = None,
        prefill_routing: str = "join_shortest_queue",
        decode_routing: str = "join_shortest_queue",
        overlap: bool = True,
        restart: bool = True,
        hash_tokens: int = 0,
    ) -> None:
        self.pools = pools
        self.events = events
        self.records = records
        self.links = links
        self.overlap = overlap
        self.restart = restart
        self.alive: dict[Request, None] = {}
        for pool in pools if hash_tokens else ():
            pool.expect_prefixes()
        self.instances = {
            name: Instance(name, pool, events, self, hash_tokens)
            for pool in pools
            for name in (f"{pool.name}/{i}" for i in range(pool.count))
        }
        busy: dict[Instance, None] = {}
        for instance in self.instances.values():
            instance.share_machine(busy)
        entries = [i for i in self.instances.values() if i.pool.role != DECODE]
        decoders = [i for i in self.instances.values() if i.pool.role == DECODE]
        self.entry = Router(entries, prefill_routing)
        self.decode = Router(decoders, decode_routing, for_decode=True)
        self.central: deque[Request] = deque()
        self.central_length = entries[0].pool.waiting
        if self.entry.central:
            for instance in entries:
                instance.share_queue(self.central, self.central_length)
        shared: deque[Request] = deque()
        self.tickets = {i.name: shared if self.decode.central else deque[Request]() for i in decoders}
        self.stranded: deque[Request] = deque()  # no instance is up to compute it
        # Any instance may get a request, and after a failure the tokens generated so far are part of its prompt.
        self._reach = min(p.longest for p in pools)
        self._arrivals: Iterator[Request] = iter(())
        self._clients = 0
        self._thinking = 0
        self.arriving = False

    def start(self, arrivals: Iterator[Request], clients: int = 0) -> None:
        """Take requests from `arrivals`, which must be in order of arrival; only the next one is held.

        With `clients`, each of them takes one, sends it after its `arrival` in seconds, and the next when it has ended.
        When the last request has ended, the events stop.
        """
        self._arrivals, self._clients = arrivals, clients
        for _ in range(clients):
            self._think()
        if not clients:
            self._next_arrival()

    def _think(self) -> None:
        """A client is about to send its next request, if any is left."""
        request = next(self._arrivals, None)
        if request is not None:
            request.arrival += self.events.now
            self._thinking += 1
            self.events.at(request.arrival, self._arrive, request)
        self.arriving = self._thinking > 0
        if not (self.arriving or self.alive):
            self.events.stop()

    def _next_arrival(self) -> None:
        if self._clients:
            self._thinking -= 1
            self.arriving = self._thinking > 0
            if not (self.arriving or self.alive):  # it was rejected, and was the last one
                self.events.stop()
            return
        request = next(self._arrivals, None)
        self.arriving = request is not None
        if request is not None:
            self.events.at(request.arrival, self._arrive, request)
        elif not self.alive:
            self.events.stop()

    def _arrive(self, request: Request) -> None:
        self.alive[request] = None
        if request.prompt + request.output - 1 <= self._reach:  # the last token needs no KV
            self._dispatch(request)
        else:
            self._end(request, REJECTED)
        self._next_arrival()

    def _dispatch(self, request: Request) -> None:
        if self.entry.central:
            self.central.append(request)
            self.central_length.add(self.events.now, 1)
            if len(self.central) == 1:  # else those before it have asked already
                self._offer()
            return
        chosen = self.entry.choose(request)
        if chosen is None:
            self.stranded.append(request)
        else:
            chosen.enqueue(request)

    def _offer(self, _: object = None) -> None:
        """The central queue has a new head: an idle instance takes it now, else the first that ends a step."""
        instances = self.entry.by_load()
        for instance in instances:
            if instance.idle and self.central:
                instance.wake()
        if self.central:
            for instance in instances:
                instance.wake()

    def _end(self, request: Request, status: int) -> None:
        del self.alive[request]
        self.records.add(request, status)
        if self._clients:
            self._think()
        elif not (self.alive or self.arriving):
            self.events.stop()

    def finish(self) -> None:
        """Nothing will happen any more: whatever is still here was never served."""
        for request in list(self.alive):
            self._end(request, FAILED)

    # -- Owner

    def on_finished(self, request: Request) -> None:
        self._end(request, FINISHED)

    def on_chunk(self, request: Request, tokens: int, seconds: float) -> None:
        home = request.home
        if not self.overlap or home is None or self._ends_here(request, home):
            return
        self._seek(request)
        if request.granted:
            reach = request.computed + tokens
            if request.computed > request.sent:
                self._send(request, request.computed)
            if reach > request.sent:
                self._send(request, reach, seconds * (reach - request.sent) / tokens)

    def on_prefilled(self, request: Request) -> None:
        self._seek(request)
        if request.granted:
            if request.target > request.sent:
                self._send(request, request.target)
            if not request.flows:
                self._hand_over(request)

    def on_room(self, instance: Instance) -> None:
        if instance.pool.role == DECODE and instance.up:
            self._grant(instance)

    def on_taken(self) -> None:
        # The new head may fit where the old one did not. Later, as the instance that took it is not done planning.
        if self.entry.central and len(self.entry.instances) > 1:
            self.events.at(self.events.now, self._offer)

    # -- KV on its way

    @staticmethod
    def _ends_here(request: Request, home: Instance) -> bool:
        return home.pool.first_token_at == PREFILL and request.generated + 1 == request.output

    def _seek(self, request: Request) -> None:
        """Ask for room on a decode instance, once."""
        if request.seeking or request.granted:
            return
        if self.decode.central:
            request.seeking = True
            next(iter(self.tickets.values())).append(request)
            for instance in self.decode.by_load():
                self._grant(instance)
            return
        peer = self.decode.choose(request)
        if peer is None:
            return  # all are down: `recover` asks again
        request.seeking = True
        peer.expect(request)
        self.tickets[peer.name].append(request)
        self._grant(peer)

    def _grant(self, instance: Instance) -> None:
        tickets = self.tickets[instance.name]
        while tickets and instance.reserve(tickets[0]):
            request = tickets.popleft()
            request.seeking = False
            if request.peer is None:
                instance.expect(request)
            home = request.home
            if home is not None and request in home.holding:
                self._send(request, request.target)

    def _send(self, request: Request, reach: int, produced_over: float = 0.0) -> None:
        """Send the KV of tokens up to `reach`."""
        home, peer = request.home, request.peer
        assert home is not None
        assert peer is not None
        assert self.links is not None
        if reach > request.sent:
            size = kv_bytes(home.pool, peer.pool, request.sent, reach, request.target)
            request.sent = reach
            if not size:
                return  # out of every window before the prompt ends
            layers = home.pool.layers if produced_over else 1
            flow = self.links.start(home.name, peer.name, size, self._arrived, request, produced_over, layers)
            request.flows.append(flow)

    def _arrived(self, flow: Flow) -> None:
        request = flow.owner
        assert isinstance(request, Request)
        request.flows.remove(flow)
        self._hand_over(request)

    def _hand_over(self, request: Request) -> None:
        home, peer = request.home, request.peer
        if (
            home is None
            or peer is None
            or request.flows
            or request not in home.holding
            or request.sent < request.target
        ):
            return
        blocks = request.blocks, request.held
        peer.deliver(request)
        home.release(request, *blocks)

    # -- failures

    def fail(self, name: str) -> bool:
        """Instance `name` dies with all its KV; False where it is down already."""
        instance = self.instances[name]
        if not instance.up:
            return False
        reserved = instance.drop_reserved()
        lost = instance.fail()
        if not self.entry.central or instance.pool.role == DECODE:
            lost += instance.drop_queue()
        if instance.pool.role == DECODE and not self.decode.central:
            reserved += self.tickets[name]
            self.tickets[name].clear()
        for request in reserved:
            self._cancel_flows(request)
            request.forget_peer()
        for request in reserved:
            if request.home is not None and request in request.home.holding:
                self._seek(request)
        for request in lost:
            self._withdraw(request)
            request.home = None
            request.restarts += 1
        for request in lost:
            if self.restart:
                self._dispatch(request)
            else:
                self._end(request, FAILED)
        return True

    def recover(self, name: str) -> None:
        """Instance `name` is back with an empty cache."""
        instance = self.instances[name]
        instance.recover()
        if instance.pool.role == DECODE:
            for other in self.entry.instances:
                for request in list(other.holding):
                    self._seek(request)
        else:
            instance.wake()
            waiting, self.stranded = self.stranded, deque()
            for request in waiting:
                self._dispatch(request)

    def _withdraw(self, request: Request) -> None:
        """Give up the request's place on its decode instance."""
        self._cancel_flows(request)
        peer = request.peer
        if request.granted and peer is not None:
            peer.expect_no_more(request)
            peer.unreserve(request)
        elif request.seeking:
            tickets = self.tickets[peer.name] if peer is not None else next(iter(self.tickets.values()))
            tickets.remove(request)
            if peer is not None:
                peer.expect_no_more(request)
        request.forget_peer()

    def _cancel_flows(self, request: Request) -> None:
        if self.links is not None:
            for flow in request.flows:
                self.links.cancel(flow)
        request.flows.clear()


def kv_bytes(source: Pool, sink: Pool, start: int, stop: int, tokens: int) -> float:
    """Bytes on the wire for the tokens `start` to `stop` of a prompt of `tokens`: every rank of the sink gets its own,
    in the narrower dtype.
    """
    narrower = min(1.0, source.model.kv_element_bytes / sink.model.kv_element_bytes)
    return sink.model.kv.sent(start, stop, tokens, narrower)
