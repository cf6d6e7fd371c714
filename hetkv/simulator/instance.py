"""One engine: continuous batching with chunked prefill, paged KV memory and preemption.

`Scheduler` decides what a step runs. Steps without prompts are not simulated one by one: `StepLine` gives the time of
all steps up to the next completion, and an arrival that could join cuts that run at the next step boundary. With
pipeline stages, steps of prompts alone follow each other by one stage, as many at once as there are stages; their
prompts are computed once the last stage is through.
"""

from __future__ import annotations

from collections import deque
from math import isnan, nan

from hetkv.simulator.events import Events
from hetkv.simulator.kv import KVBlocks
from hetkv.simulator.owner import Owner
from hetkv.simulator.pool import PREFILL, Pool
from hetkv.simulator.request import Request
from hetkv.simulator.request_kv import RequestKV
from hetkv.simulator.scheduler import Chunk, Scheduler
from hetkv.simulator.series import Series

End = tuple[Request, int]
"""A request whose prompt a step completes, and its `run` by then."""


class Instance:
    """Runs requests. Times are simulated seconds, lengths tokens."""

    __slots__ = (
        "_busy", "_changed", "_coming", "_crowd", "_decodes", "_ends", "_epoch", "_flights", "_growth", "_landed",
        "_life", "_settling", "_start", "_steps", "_whole", "coming_tokens", "events", "holding", "kv", "memory",
        "name", "owner", "pool", "prompt_tokens", "requests", "reserved", "scheduler", "up",
    )  # fmt: skip

    def __init__(self, name: str, pool: Pool, events: Events, owner: Owner, hash_tokens: int = 0) -> None:
        self.name = name
        self.pool = pool
        self.events = events
        self.owner = owner
        self.up = True
        self.kv = KVBlocks(pool.kv_pages, pool.block_size, hash_tokens if pool.prefix_caching else 0)
        self.memory = RequestKV(self.kv, pool.pages)
        self.scheduler = Scheduler(pool, events, self.memory, lambda tokens: self._count(0, tokens))
        self.reserved: dict[Request, None] = {}  # blocks taken here for KV that is still elsewhere
        self.holding: dict[Request, None] = {}  # prefilled here, KV not yet delivered
        self.requests = 0  # those here or bound for here: what the router balances
        self.prompt_tokens = 0  # still to be computed here
        self.coming_tokens = 0  # of KV that is bound for this instance
        self._coming: dict[Request, int] = {}
        self._changed: dict[Instance, None] = {}
        self._epoch, self._busy = 0, False  # an end of run scheduled in an older epoch is void
        self._whole, self._start = False, 0.0  # whether the run in progress may no longer be cut, and its beginning
        self._steps = 0  # of the run in progress
        self._growth = 0  # blocks its decode batch takes, accounted for at its end
        self._decodes = False  # the decode batch is part of it
        self._ends: list[End] = []  # prompts that the run in progress completes
        self._flights, self._landed = 0, 0.0  # steps of prompts that the last stage has yet to end, and when it will
        self._life = 0  # a flight that was begun in an older life is void
        self._settling = False  # a flight's prompts are being handed on: nothing is started meanwhile
        self._crowd: dict[Instance, None] = {}  # those of its machine that are busy, where that matters

    def report_to(self, changed: dict[Instance, None]) -> None:
        """From now on, enter this instance in `changed` whenever `requests` or `prompt_tokens` fall or `up` changes."""
        self._changed = changed

    def _count(self, requests: int, prompt_tokens: int) -> None:
        self.requests += requests
        self.prompt_tokens += prompt_tokens
        if requests < 0 or prompt_tokens < 0:
            self._changed[self] = None

    def share_machine(self, busy: dict[Instance, None]) -> None:
        """Its steps are slowed down by the instances in `busy`, which it enters while it is busy itself."""
        self._crowd = busy

    # -- for the deployment around it

    @property
    def idle(self) -> bool:
        """Up and running nothing."""
        return self.up and not self._busy

    def wake(self) -> None:
        """There may be something new to run: start it now if idle, else at the next step boundary."""
        if self._settling:
            return
        if not self._busy:
            if self.up:
                self._plan()
        elif not self._whole and self.scheduler.places > 0:
            self._cut()

    def enqueue(self, request: Request) -> None:
        """Compute this request's prompt here, after those that wait already."""
        self._count(1, request.target)
        request.home = self
        self.scheduler.enqueue(request)
        if len(self.scheduler.queue) == 1 or not self._busy:
            self.wake()

    def share_queue(self, queue: deque[Request], length: Series) -> None:
        """Take prompts from the head of `queue`, which other instances take from, too."""
        self.scheduler.share_queue(queue, length)

    def expect(self, request: Request) -> None:
        """The request's KV will come here; it counts among `requests`."""
        request.peer = self
        self._coming[request] = request.target
        self.coming_tokens += request.target
        self._count(1, 0)

    def expect_no_more(self, request: Request) -> None:
        """A request that was expected goes elsewhere."""
        self.coming_tokens -= self._coming.pop(request)
        self._count(-1, 0)

    def drop_queue(self) -> list[Request]:
        """Remove and return the prompts that wait here."""
        return self.scheduler.drop_queue()

    def drop_reserved(self) -> list[Request]:
        """Release and return the requests that have reserved room. Only before `fail`: no blocks are given back."""
        dropped = list(self.reserved)
        self.reserved.clear()
        return dropped

    def reserve(self, request: Request) -> bool:
        """Take blocks for KV of the request that will come over a link; False where there is no room."""
        held = self.memory.cached_prefix(request)
        blocks = self.memory.needed(request.target - (self.pool.first_token_at != PREFILL), held)
        self.kv.hold(held)
        if not self._take_during_run(blocks):
            self.kv.drop(held)
            return False
        self.reserved[request] = None
        request.granted = True
        request.peer_blocks, request.peer_held = blocks, held
        request.sent = len(held) * self.kv.hash_tokens
        return True

    def unreserve(self, request: Request) -> None:
        """The KV that room was reserved for will not come."""
        del self.reserved[request]
        self.kv.give(request.peer_blocks)
        self.kv.drop(request.peer_held)
        self._room()

    def deliver(self, request: Request) -> None:
        """The KV that room was reserved for is here: decode the request."""
        now = self.events.now
        del self.reserved[request]
        request.home = self
        self.coming_tokens -= self._coming.pop(request)
        request.blocks, request.held = request.peer_blocks, request.peer_held
        request.forget_peer()
        request.visible = now
        self.memory.share(request)
        self.scheduler.ready.append(request)
        self.pool.waiting.add(now, 1)
        if len(self.scheduler.ready) == 1 or not self._busy:
            self.wake()

    def release(self, request: Request, blocks: int, held: tuple[int, ...]) -> None:
        """The KV of a request that was prefilled here, `blocks` and the prefix `held`, has been delivered."""
        del self.holding[request]
        self._count(-1, 0)
        self.kv.give(blocks)
        self.kv.drop(held)
        self._room()

    def fail(self) -> list[Request]:
        """All KV here is lost. Returns the requests that were here, progress kept as tokens, cache forgotten.

        Those of `drop_queue` and `drop_reserved`, whose KV is not here, are for the owner to route again.
        """
        now, batch = self.events.now, self.scheduler.batch
        done = self._begun() - 1 if self._busy and self._decodes and self._steps > 1 else 0
        self.pool.decode_tokens += batch.advance(done)
        for request in batch.members:
            if request.first_token > now:
                request.first_token = nan
        lost = [*self.scheduler.drop_all(), *self.holding]
        self.holding.clear()
        for request in lost:
            request.forget()
        self.kv.reset()
        self._ends = []
        self._flights, self._landed = 0, 0.0
        self._life += 1
        self._idle()
        self._count(-self.requests, -self.prompt_tokens)
        self._coming.clear()
        self.coming_tokens, self.up = 0, False
        self._changed[self] = None
        self.pool.down.add(now, 1)
        return lost

    def recover(self) -> None:
        """Restarted, with an empty cache."""
        self.up = True
        self._changed[self] = None
        self.pool.down.add(self.events.now, -1)
        self._room()

    # -- one step, or one run of decode steps

    def _plan(self) -> None:
        """Choose what runs next and start it."""
        pool, scheduler, batch, now = self.pool, self.scheduler, self.scheduler.batch, self.events.now
        slow = 1 + pool.model.crowding * (len(self._crowd) - self._busy) if self._crowd else 1.0
        if scheduler.fresh or scheduler.ready or self.kv.free < pool.block_pages * len(batch.members):
            scheduler.plan_decodes()
        else:  # nothing joins, and nothing has to leave
            scheduler.preempted = False
        size = len(batch.members)
        chunks: list[Chunk] = []
        if self._flights < pool.stages:
            if scheduler.queue or scheduler.prefilling or scheduler.resumed:
                chunks = scheduler.plan_prompts()
                self._adopt()
            if not chunks and not size and scheduler.ready:
                self._plan()  # the prompt that had the last place was preempted: what is ready takes it
                return
        self._decodes = size > 0 and (not chunks or pool.chunked_prefill)
        if chunks:
            tokens, pairs = 0, 0.0
            for request, n in chunks:
                tokens += n
                pairs += n * request.computed + n * (n + 1) / 2
            decoding = size if self._decodes else 0
            seconds = slow * pool.model.step_seconds(decoding, batch.context if decoding else 0.0, tokens, pairs)
            first, self._steps, self._growth = seconds, 1, 0
            pool.prefill_tokens += tokens
            if pool.role == PREFILL:
                for request, n in chunks:
                    self.owner.on_chunk(request, n, seconds)
            self._ends = self._advance(chunks)
            if pool.stages > 1:
                seconds = self._fly(seconds, float(pool.model.step_share(decoding, tokens)))
        elif size:
            line = pool.line(size)
            # After a preemption the next step may admit what this one may not.
            self._steps = batch.to_next_change() if pool.skip_ahead and not scheduler.preempted else 1
            self._growth = batch.growth(self._steps)
            if self._growth > self.kv.free and self._growth > self.kv.available:
                self._steps = batch.steps_within(self.kv.available, self._steps)
                self._growth = batch.growth(self._steps)
            seconds = slow * line.seconds(batch.context, self._steps)
            first = slow * line.seconds(batch.context, 1) if scheduler.joined else seconds
        else:
            self._idle()
            return
        if self._decodes and scheduler.joined:
            for request in scheduler.joined:
                if request in batch.members:
                    request.decode_from = now
                    if isnan(request.first_token):
                        request.first_token = now + first
            scheduler.joined.clear()
        if not self._busy:
            self._busy = True
            pool.busy.add(now, 1)
            if pool.model.crowding:
                self._crowd[self] = None
        self._start = now
        self._whole = self._steps == 1
        self._epoch += 1
        self.events.at(now + seconds, self._end, self._epoch)

    def _end(self, epoch: int) -> None:
        """The run in progress is over."""
        if epoch != self._epoch:
            return
        self._whole = True
        if self._decodes:
            taken = self.kv.take(self._growth)
            assert taken, "a run was planned beyond the free blocks"
            self._growth = 0
            self.pool.decode_tokens += self.scheduler.batch.advance(self._steps)
            finished = self.scheduler.batch.pop_finished()
            for request in finished:
                self.memory.sync(request)
                self._finish(request)
            if finished:
                self.owner.on_room(self)
        self._decodes = False
        if self._ends:
            ends, self._ends = self._ends, []
            self._computed(ends)
        self._plan()

    def _adopt(self) -> None:
        """Prompts out of a central queue become this instance's."""
        for request in self.scheduler.taken:
            if request.home is not self:
                request.home = self
                self._count(1, request.target)
        if self.scheduler.taken and self.scheduler.queue:
            self.owner.on_taken()

    def _advance(self, chunks: list[Chunk]) -> list[End]:
        """Count the tokens of a step that starts now as computed; returns the prompts that it completes."""
        ends, computed = [], 0
        for request, tokens in chunks:
            request.computed += tokens
            computed += tokens
            if request.computed == request.target:
                ends.append((request, request.run))
        self._count(0, -computed)
        return ends

    def _computed(self, ends: list[End]) -> None:
        """Prompts are through, unless they were preempted meanwhile."""
        for request, run in ends:
            if request.run == run and request in self.scheduler.prefilling:
                self._prefilled(request)

    def _fly(self, seconds: float, share: float) -> float:
        """The step's tokens are out after `seconds`; returns when the next may start. Flights end in their order."""
        if share == 1:
            return seconds
        interval = share * seconds
        self._landed = max(self.events.now + seconds, self._landed + interval)
        self._flights += 1
        self.events.at(self._landed, self._land, (self._life, self._ends))
        self._ends = []
        return interval

    def _land(self, flight: tuple[int, list[End]]) -> None:
        """A step of prompts has left the last stage."""
        life, ends = flight
        if life != self._life:
            return
        self._flights -= 1
        self._settling = True
        self._computed(ends)
        self._settling = False
        if not self._busy:
            self._plan()
        elif self.scheduler.fresh and not self._whole:
            self._cut()

    def _cut(self) -> None:
        """End the run of decode steps in progress at its next step boundary."""
        self._whole = True
        batch, now, steps = self.scheduler.batch, self.events.now, self._begun()
        if steps < self._steps:
            line = self.pool.line(len(batch.members))
            self._steps = steps
            self._growth = batch.growth(steps)
            self._epoch += 1
            self.events.at(max(self._start + line.seconds(batch.context, steps), now), self._end, self._epoch)

    def _idle(self) -> None:
        self._epoch += 1
        self._decodes = False
        self._growth = self._steps = 0
        if self._busy:
            self._busy = False
            self._crowd.pop(self, None)
            self.pool.busy.add(self.events.now, -1)

    def _prefilled(self, request: Request) -> None:
        del self.scheduler.prefilling[request]
        if self.memory.settle(request):
            self.owner.on_room(self)
        self.memory.share(request)
        pool, now = self.pool, self.events.now
        hand_off = pool.role == PREFILL
        if not hand_off or pool.first_token_at == PREFILL:
            request.generated += 1
            pool.prefill_outputs += 1
            if isnan(request.first_token):
                request.first_token = now
        if request.generated == request.output:
            self._finish(request)
            self.owner.on_room(self)
        elif hand_off:
            pool.running.add(now, -1)
            self.holding[request] = None
            request.prefilled = now
            self.owner.on_prefilled(request)
        else:
            request.decode_from = now
            self.scheduler.fresh.append(request)

    def _finish(self, request: Request) -> None:
        now = self.events.now
        request.last_token = now
        self.memory.free(request)
        self._count(-1, 0)
        self.pool.running.add(now, -1)
        self.owner.on_finished(request)

    @property
    def available(self) -> int:
        """Blocks that can be taken, less those of the ended steps of a run: it accounts for them at its end."""
        midway = self._growth and self._steps > 1
        return self.kv.available - (self.scheduler.batch.growth(self._begun() - 1) if midway else 0)

    def _begun(self) -> int:
        """Steps of the run of decode steps in progress, the present one included."""
        batch = self.scheduler.batch
        return self.pool.line(len(batch.members)).steps_until(batch.context, self.events.now - self._start, self._steps)

    def _take_during_run(self, blocks: int) -> bool:
        """Take blocks while a run of decode steps is in progress that accounts for its own only at its end."""
        if self.kv.available - self._growth < blocks:
            batch = self.scheduler.batch
            if self._whole or not self._busy or self.kv.available - batch.growth(self._begun()) < blocks:
                return False
            self._cut()
        return self.kv.take(blocks)

    def _room(self) -> None:
        """Blocks became free outside a step: the owner's tickets come first, then whatever waits here."""
        self.owner.on_room(self)
        if self.scheduler.resumed or self.scheduler.ready or self.scheduler.queue:
            self.wake()
