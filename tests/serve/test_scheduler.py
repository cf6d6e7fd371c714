"""The global scheduler alone, with instances that are played: pairing, losses, links, roles; and nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from hetkv.errors import GenerationError, InputError
from hetkv.runtime.block_manager import prefix_hashes
from hetkv.runtime.commands import Abort, Begin, Compute, Expect, Link, Linked, Load, Output, Report
from hetkv.runtime.sampling import Sampling, Token
from hetkv.serve.generation import Generation
from hetkv.serve.member import Member
from hetkv.serve.messages import Goodbye, Hello, Rejected
from hetkv.serve.scheduler import MOST_ATTEMPTS, Scheduler
from hetkv.simulator.router import DISCIPLINES

IDLE = Load(0, 0, 0, 0, 0, 100, 0, 0, 0, 0.0, 0.0)


def hello(name: str, role: str, **changes: Any) -> Hello:
    values: dict[str, Any] = {
        "name": name, "role": role, "pool": role, "gpu": "g", "device": "cpu", "model": "m", "fingerprint": {"w": "1"},
        "addresses": ("127.0.0.1:1",), "blocks": 100, "block_size": 16, "token_bytes": 1.0, "unit": 64,
        "max_num_seqs": 8, "max_context": 1000, "vocabulary": 100,
    }  # fmt: skip
    return Hello(**{**values, **changes})


class Fleet:
    """A scheduler, and what it has said to each of its members."""

    def __init__(self, *roles: str, **routing: str) -> None:
        self.ended: list[Generation] = []
        self.scheduler = Scheduler(**routing, on_end=self.ended.append)  # type: ignore[arg-type]
        self.said: dict[str, list[Any]] = {}
        for number, role in enumerate(roles):
            self.join(hello(f"{role}-{number}", role))

    def join(self, hello: Hello, link: bool = True) -> Member:
        """A member that links as the scheduler asks."""
        said = self.said[hello.name] = []
        member = Member(hello, said.append)
        self.scheduler.join(member)
        for _ in range(2 if link else 0):  # links of the newcomer, and of those that were there to it
            for name, messages in self.said.items():
                for message in [m for m in messages if isinstance(m, Link)]:
                    messages.remove(message)
                    self.report(name, linked=[Linked(message.name)])
        return member

    def __getitem__(self, name: str) -> Member:
        return self.scheduler.members[name]

    def take(self, name: str, kind: Callable[..., Any]) -> list[Any]:
        """Remove and return the messages of one kind that a member was sent."""
        found = [message for message in self.said[name] if isinstance(message, kind)]  # type: ignore[arg-type]
        self.said[name][:] = [message for message in self.said[name] if message not in found]
        return found

    def report(self, name: str, **what: Any) -> None:
        member = self.scheduler.members.get(name)
        if member is not None:
            self.scheduler.on_report(member, Report(load=what.pop("load", IDLE), **what))

    def output(self, name: str, id: str, token: int = 7, finish: str = "") -> None:
        self.report(name, outputs=[Output(id, Token(token), finish)])

    def submit(self, prompt: list[int] | int = 10, tokens: int = 5) -> Generation:
        ids = [1] * prompt if isinstance(prompt, int) else prompt
        generation = Generation(ids, Sampling(max_tokens=tokens))
        self.scheduler.submit(generation)
        return generation

    def check_empty(self) -> None:
        assert not self.scheduler.generations
        assert not self.scheduler.waiting
        for member in self.scheduler.members.values():
            counts = member.requests, member.prompt_tokens, member.coming_tokens
            assert (counts, member.generations) == ((0, 0, 0), {}), member


def answers(generation: Generation) -> list[int]:
    async def read() -> list[int]:
        return [token.id async for token, _ in generation]

    return asyncio.run(read())


def test_a_request_is_computed_here_and_decoded_there() -> None:
    fleet = Fleet("prefill", "decode")
    generation = fleet.submit(tokens=3)
    [compute], [expect] = fleet.take("prefill-0", Compute), fleet.take("decode-1", Expect)
    assert (compute.goes_to, expect.source) == ("decode-1", "prefill-0")
    assert compute.transfer == expect.transfer
    assert compute.tokens == expect.tokens == [1] * 10
    assert fleet["prefill-0"].prompt_tokens == fleet["decode-1"].coming_tokens == 10
    fleet.report("prefill-0", progress={generation.transfer: 6})
    assert fleet["prefill-0"].prompt_tokens == 4
    fleet.output("prefill-0", generation.transfer, 3)
    assert fleet.take("decode-1", Begin) == [Begin(generation.transfer, 3)]
    assert fleet["prefill-0"].requests == 1
    fleet.report("decode-1", arrived=[generation.transfer])
    assert fleet["prefill-0"].requests == fleet["decode-1"].coming_tokens == 0
    fleet.output("decode-1", generation.transfer, 4)
    fleet.output("decode-1", generation.transfer, 5, "length")
    assert answers(generation) == [3, 4, 5]
    assert [(g.id, g.finish) for g in fleet.ended] == [(generation.id, "length")]
    fleet.check_empty()


def test_one_token_needs_no_decoding_and_an_early_end_is_reported() -> None:
    fleet = Fleet("prefill", "decode")
    one = fleet.submit(tokens=1)
    assert fleet.take("prefill-0", Compute)[0].goes_to == ""
    assert not fleet.take("decode-1", Expect)
    fleet.output("prefill-0", one.transfer, finish="length")
    early = fleet.submit(tokens=5)
    fleet.output("prefill-0", early.transfer, finish="stop")
    assert [abort.id for abort in fleet.take("decode-1", Abort)] == [early.transfer]
    fleet.check_empty()


def test_a_lost_decoder_costs_no_request() -> None:
    """What was generated is computed with the prompt elsewhere, and not generated again."""
    fleet = Fleet("prefill", "decode", "decode")
    generations = [fleet.submit(tokens=6) for _ in range(8)]
    at = {name: [expect.id for expect in fleet.take(name, Expect)] for name in ("decode-1", "decode-2")}
    assert sorted(map(len, at.values())) == [4, 4]
    for generation in generations:
        fleet.output("prefill-0", generation.transfer, 3)
    fleet.report("decode-1", arrived=at["decode-1"][:2])
    fleet.output("decode-1", at["decode-1"][0], 4)
    fleet.take("prefill-0", Compute)
    fleet.scheduler.lost(fleet["decode-1"], "killed")
    assert {abort.id for abort in fleet.take("prefill-0", Abort)} == set(at["decode-1"][2:])
    again = {compute.id: compute for compute in fleet.take("prefill-0", Compute)}
    assert set(again) == {name.replace("/1", "/2") for name in at["decode-1"]}  # another name: the first may end late
    first = again[at["decode-1"][0].replace("/1", "/2")]
    assert (first.tokens[-2:], first.generated, first.goes_to) == ([3, 4], 2, "decode-2")
    assert first.transfer.endswith("/2")
    for generation in generations:
        while not generation.ended:
            name = "prefill-0" if generation.transfer in again else "decode-2"
            again.pop(generation.transfer, None)
            last = len(generation.generated) == 5
            fleet.output(name, generation.transfer, 9, "length" if last else "")
        assert len(answers(generation)) == 6
    assert sum(generation.restarts for generation in generations) == 4
    fleet.check_empty()


def test_requests_wait_for_instances() -> None:
    fleet = Fleet("decode")
    generations = [fleet.submit() for _ in range(3)]
    assert list(fleet.scheduler.waiting) == generations
    fleet.join(hello("prefill-9", "prefill"))
    assert [compute.id for compute in fleet.take("prefill-9", Compute)] == [g.transfer for g in generations]
    fleet.scheduler.lost(fleet["decode-0"], "killed")
    assert set(fleet.scheduler.waiting) == set(generations)
    fleet.scheduler.cancel(generations[1])
    fleet.join(hello("both", "aggregated"))
    assert len(fleet.take("both", Compute)) == 2
    for generation in generations:
        fleet.scheduler.cancel(generation)
    fleet.check_empty()


def test_a_request_that_always_fails_is_given_up() -> None:
    fleet = Fleet("aggregated")
    generation = fleet.submit()
    for _ in range(MOST_ATTEMPTS):
        fleet.report("aggregated-0", failed={generation.transfer: "no luck"})
    with pytest.raises(GenerationError, match=f"after {MOST_ATTEMPTS} attempts.*no luck"):
        answers(generation)
    fleet.check_empty()


def test_an_instance_gets_requests_once_it_is_linked() -> None:
    fleet = Fleet("prefill", "decode")
    newcomer = fleet.join(hello("late", "decode"), link=False)
    assert not newcomer.up
    for _ in range(4):
        fleet.submit()
    assert not fleet.take("late", Expect)
    assert fleet.take("late", Link) == [Link("prefill-0", ("127.0.0.1:1",))]
    fleet.report("late", linked=[Linked("prefill-0", "PeerLostError: try again")])
    assert fleet.take("late", Link)
    fleet.report("late", linked=[Linked("prefill-0")])
    assert newcomer.up
    fleet.submit()
    assert fleet.take("late", Expect)


def test_what_does_not_fit_is_rejected_by_name() -> None:
    fleet = Fleet("prefill", "decode")
    fleet.join(hello("other", "decode", fingerprint={"w": "2"}))
    [rejected] = fleet.take("other", Rejected)
    assert rejected.reason == "its w 2 are not those of prefill-0, 1"
    fleet.join(hello("odd", "decode"), link=False)
    fleet.report("odd", linked=[Linked("prefill-0", "IncompatibleError: head_dim: mine 64, theirs 128", final=True)])
    assert "head_dim" in fleet.take("odd", Rejected)[0].reason
    assert set(fleet.scheduler.members) == {"prefill-0", "decode-1"}
    assert set(fleet.scheduler.rejected) == {"other", "odd"}
    assert fleet["prefill-0"].up


def test_a_role_switches_without_losing_what_is_there() -> None:
    fleet = Fleet("prefill", "prefill", "decode")
    running = [fleet.submit() for _ in range(2)]
    member = fleet.scheduler.set_role("prefill-1", "decode")
    assert (member.role, member.up) == ("prefill", True)
    assert [link.name for link in fleet.take("prefill-1", Link)] == ["prefill-0"]
    fleet.report("prefill-1", linked=[Linked("prefill-0")])
    assert (member.role, member.up) == ("decode", True)
    assert fleet.scheduler.decode.instances == [fleet["decode-2"], member]
    for generation in running:
        [home] = [name for name in ("prefill-0", "prefill-1") if generation.transfer in fleet[name].generations]
        fleet.output(home, generation.transfer)
        fleet.report("decode-2", arrived=[generation.transfer])
        fleet.output("decode-2", generation.transfer, finish="stop")
    fleet.check_empty()
    for _ in range(2):
        fleet.submit()
    assert len(fleet.take("prefill-1", Expect)) == len(fleet.take("decode-2", Expect)) - 2 == 1
    with pytest.raises(InputError, match="no instance 'x'"):
        fleet.scheduler.set_role("x", "decode")
    with pytest.raises(InputError, match="role 'both'"):
        fleet.scheduler.set_role("prefill-1", "both")


def test_one_that_leaves_ends_what_it_has() -> None:
    fleet = Fleet("aggregated", "aggregated")
    first, second = fleet.submit(), fleet.submit()
    fleet.scheduler.leave(fleet["aggregated-0"])
    assert not fleet.take("aggregated-0", Goodbye)
    third = fleet.submit()
    assert [compute.id for compute in fleet.take("aggregated-0", Compute)] == [first.transfer]
    fleet.output("aggregated-0", first.transfer, finish="stop")
    assert fleet.take("aggregated-0", Goodbye)
    for generation in (second, third):
        fleet.output("aggregated-1", generation.transfer, finish="stop")
    fleet.check_empty()


def test_equal_instances_share_the_speed_that_they_measure() -> None:
    """Else all requests would go to the one that measured the better one, while the other has nothing to do."""
    fleet = Fleet("aggregated", "aggregated")
    for number, seconds in enumerate((1e-4, 3e-4)):
        fleet.report(f"aggregated-{number}", load=msgspec.structs.replace(IDLE, prompt_token_s=seconds))
    assert fleet["aggregated-0"].pool.seconds_per_prompt_token == pytest.approx(2e-4)
    homes = []
    for _ in range(6):
        generation = fleet.submit()
        assert generation.home is not None
        homes.append(generation.home.name)
        fleet.report(generation.home.name, progress={generation.transfer: 10})  # it is computed, and decodes
    assert homes.count("aggregated-0") == homes.count("aggregated-1") == 3
    slower = fleet.join(hello("aggregated-2", "aggregated", gpu="another"))
    assert slower.pool is not fleet["aggregated-0"].pool
    fleet.scheduler.lost(fleet["aggregated-1"], "a test")
    assert fleet["aggregated-0"].pool.seconds_per_prompt_token == pytest.approx(1e-4)


def test_prompts_go_where_their_prefix_is() -> None:
    fleet = Fleet("prefill", "prefill", "decode", "decode")
    prompt = [n % 90 for n in range(200)]
    hashes = list(prefix_hashes(prompt, 64))
    fleet.report("prefill-1", came=hashes)
    fleet.report("decode-3", came=hashes)
    fleet.submit(prompt)
    assert fleet.take("prefill-1", Compute)
    assert fleet.take("decode-3", Expect)
    fleet.report("prefill-1", gone=hashes)
    fleet.report("decode-3", reset=True)
    fleet.submit(prompt)
    assert fleet.take("prefill-0", Compute)
    assert fleet.take("decode-2", Expect)


def test_what_is_too_long_for_an_instance_is_rejected() -> None:
    fleet = Fleet("prefill", "decode")
    fleet.join(hello("small", "decode", blocks=10))
    with pytest.raises(InputError, match="161 tokens are more than an instance holds: 160"):
        fleet.submit(157, tokens=5)
    fleet.submit(156, tokens=5)


def test_a_central_queue_feeds_those_that_are_free() -> None:
    fleet = Fleet("prefill", "prefill", "decode", prefill="central_queue")
    generations = [fleet.submit() for _ in range(5)]
    assert len(fleet.scheduler.waiting) == 3
    fleet.report("prefill-0", progress={generations[0].transfer: 10})
    assert len(fleet.scheduler.waiting) == 2
    assert generations[2].home is fleet["prefill-0"]


@pytest.mark.parametrize("discipline", DISCIPLINES)
def test_random_events_leave_nothing(discipline: str) -> None:
    """Instances that come, go and fail, clients that leave: every request ends, and all counts are zero then."""
    rng = random.Random(len(discipline))
    fleet = Fleet("prefill", "decode", prefill=discipline, decode=discipline)
    names = iter(range(1000))
    for _ in range(600):
        action = rng.random()
        members = list(fleet.scheduler.members.values())
        if action < 0.3:
            fleet.submit(rng.randrange(1, 200), rng.randrange(1, 6))
        elif action < 0.34:
            role = rng.choice(("prefill", "decode", "aggregated"))
            fleet.join(hello(f"n{next(names)}", role))
        elif action < 0.37 and len(members) > 2:
            fleet.scheduler.lost(rng.choice(members), "killed")
        elif action < 0.38 and len(members) > 2:
            fleet.scheduler.leave(rng.choice(members))
        elif action < 0.45 and fleet.scheduler.generations:
            fleet.scheduler.cancel(rng.choice(list(fleet.scheduler.generations.values())))
        elif members:
            play(fleet, rng, rng.choice(members))
    fleet.join(hello("last-p", "prefill"))
    fleet.join(hello("last-d", "decode"))
    for _ in range(20000):
        if not fleet.scheduler.generations:
            break
        play(fleet, rng, rng.choice(list(fleet.scheduler.members.values())))
    fleet.check_empty()


def play(fleet: Fleet, rng: random.Random, member: Member) -> None:
    """What an instance may say next of one of its requests."""
    if not member.generations:
        fleet.report(member.name)
        return
    generation = rng.choice(list(member.generations.values()))
    if rng.random() < 0.05:
        fleet.report(member.name, failed={generation.transfer: "a fault"})
    elif generation.home is member and generation.left:
        fleet.report(member.name, progress={generation.transfer: generation.target - rng.randrange(generation.left)})
    elif generation.peer is member and generation.coming and rng.random() < 0.5:
        fleet.report(member.name, arrived=[generation.transfer])
    elif (generation.home is member and not generation.begun) or (generation.begun and not generation.coming):
        last = len(generation.generated) + 1 >= generation.sampling.max_tokens
        fleet.output(member.name, generation.transfer, finish="length" if last else "")
