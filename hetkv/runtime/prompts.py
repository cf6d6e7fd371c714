"""Prompts of a demo: texts or chats, from the command line or a file, as token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hetkv.errors import InputError
from hetkv.runtime.chat import ChatTemplate
from hetkv.runtime.tokenizer import TextTokenizer


class Prompt(msgspec.Struct, frozen=True):
    """A text to continue, or a chat to answer."""

    text: str
    """The text, or the user's words."""
    messages: tuple[dict[str, str], ...] | None = None
    """The chat, as chat templates take it."""


def user(text: str) -> Prompt:
    """A chat of one message."""
    return Prompt(text, ({"role": "user", "content": text},))


def read_prompts(path: str | Path, chat: bool = False) -> list[Prompt]:
    """One prompt a line. Of a `.jsonl` file a line is a JSON string, `{"prompt": TEXT}` or `{"messages": [...]}`; of
    any other file it is the text itself. Empty lines are left out. With `chat` a text is a user's message."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    make = user if chat else Prompt
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            found.append(_parse(line, where, chat) if str(path).endswith(".jsonl") else make(line))
    if not found:
        raise InputError(f"{path}: no prompt in it")
    return found


def _parse(line: str, where: str, chat: bool) -> Prompt:
    try:
        value: Any = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if isinstance(value, dict) and set(value) == {"prompt"}:
        value = value["prompt"]
    if isinstance(value, str):
        return user(value) if chat else Prompt(value)
    messages = value.get("messages") if isinstance(value, dict) and set(value) == {"messages"} else None
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: must be a string, {{"prompt": TEXT}} or {{"messages": [...]}}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise InputError(f"{where}: a message has a `role` and a `content`, both strings")
    return Prompt(messages[-1]["content"], tuple(messages))


def spread(prompts: Sequence[Prompt], count: int) -> Iterator[Prompt]:
    """`count` prompts: all in turn, each time with one more word left out at the beginning of a text, so that no two
    are alike and a mix-up is seen."""
    for index in range(count):
        prompt = prompts[index % len(prompts)]
        words = [match.start() for match in re.finditer(r"\S+", prompt.text)]
        left_out = index // len(prompts) % max(len(words), 1)
        text = prompt.text[words[left_out] :] if left_out else prompt.text
        if prompt.messages is None:
            yield Prompt(text)
        else:
            yield Prompt(text, (*prompt.messages[:-1], {**prompt.messages[-1], "content": text}))


def encode(prompts: Sequence[Prompt], tokenizer: TextTokenizer, model: str) -> list[list[int]]:
    """Token ids. `InputError` for a text that is no Unicode or has no tokens, and for a chat without a template."""
    found = []
    template = None
    if any(prompt.messages is not None for prompt in prompts):
        template = ChatTemplate.load(model)
        if template is None:
            raise InputError(f"{model}: its tokenizer has no chat template")
    for prompt in prompts:
        try:
            prompt.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not UTF-8 at character {error.start}") from None
        if template is None or prompt.messages is None:
            ids = tokenizer.encode(prompt.text)
        else:
            ids = tokenizer.encode(template.render(prompt.messages), special_tokens=False)
        if not ids:
            raise InputError("a prompt has no tokens: the tokenizer returns none for its text")
        found.append(ids)
    return found


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
