"""Names of sequences: which of an HTTP request's prompts and choices one of vLLM's requests is.

A client may ask for many sequences at once: `prompt` may be a list, and `n` asks for several choices of each prompt.
All carry the same `kv_transfer_params`, and so the same transfer id; vLLM distinguishes them by its request id alone:

| vLLM's request id | what it is |
|---|---|
| `cmpl-X-3-0badcafe` | prompt 3 of the completion request X |
| `2_cmpl-X-3-0badcafe` | choice 2 of that prompt, where `n` is above 1 |
| `chatcmpl-X-0badcafe` | a chat, or whatever else has one prompt |

The last eight digits are vLLM's own random ones, which differ on producer and consumer; the position is the same.
"""

from __future__ import annotations

import re
import uuid
from collections import OrderedDict
from typing import NamedTuple

import vllm.envs as envs

from hetkv.integrations.names import wire_name

MAX_REMEMBERED = 4096
_CHOICE = re.compile(r"\d+_(.+)")
_RANDOMISED = re.compile(r"(cmpl-.+)-(\d+)-[0-9a-f]{8}")
_PLAIN = re.compile(r"(cmpl-.+)-(\d+)")


class Sequence(NamedTuple):
    """One of vLLM's requests as a part of a client's."""

    prompt: str
    """vLLM's request id without the choice: equal for all choices of one prompt, and of nothing else."""
    group: str
    """Equal for all prompts of one list."""
    position: int
    """Of the prompt in its list."""

    @classmethod
    def of(cls, request_id: str) -> Sequence:
        """Read vLLM's request id."""
        choice = _CHOICE.fullmatch(request_id)
        prompt = choice[1] if choice else request_id
        form = _PLAIN if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else _RANDOMISED
        item = form.fullmatch(prompt)
        return cls(prompt, item[1], int(item[2])) if item else cls(prompt, prompt, 0)

    def name(self, transfer_id: str) -> str:
        """The sequence's request id on the wire: choices of one prompt share it, as they share its KV."""
        return wire_name(transfer_id, self.position)


class TransferIds:
    """Transfer ids of requests whose router gave none: one for all prompts of a list.

    vLLM's answer to a list has the parameters of its first prompt alone, and a router hands those on for all.
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[str, tuple[str, dict[int, str]]] = OrderedDict()

    def of(self, sequence: Sequence) -> str:
        """A new one where the group is new, or comes again: a client may reuse its request ids."""
        transfer_id, prompts = self._groups.pop(sequence.group, ("", {}))
        if not transfer_id or prompts.setdefault(sequence.position, sequence.prompt) != sequence.prompt:
            transfer_id, prompts = uuid.uuid4().hex, {sequence.position: sequence.prompt}
        self._groups[sequence.group] = transfer_id, prompts
        if len(self._groups) > MAX_REMEMBERED:
            self._groups.popitem(last=False)
        return transfer_id


class Claims:
    """Which prompt took a name first. A producer sends, and a consumer loads, only for that; others of the name are
    further choices of the prompt, or a mistake of the router's."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, str] = OrderedDict()

    def taken(self, name: str, sequence: Sequence) -> bool:
        """Whether another choice of this very prompt has the name."""
        return self._prompts.get(name) == sequence.prompt

    def take(self, name: str, sequence: Sequence) -> None:
        """The prompt's first choice has the name from now on."""
        self._prompts.pop(name, None)
        self._prompts[name] = sequence.prompt
        if len(self._prompts) > MAX_REMEMBERED:
            self._prompts.popitem(last=False)
