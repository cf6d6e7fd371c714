"""A checkpoint's chat template: `ChatTemplate`, rendered as `transformers` does it, without importing it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hetkv.errors import InputError
from hetkv.models.fields import load_object

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """Jinja in a sandbox, over messages and the checkpoint's special tokens."""

    def __init__(self, source: str, tokens: Mapping[str, str], origin: str) -> None:
        from jinja2 import TemplateError

        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise InputError(f"{origin}: its chat template is no Jinja: {error}") from None
        self._tokens = dict(tokens)

    @classmethod
    def load(cls, directory: str | Path) -> ChatTemplate | None:
        """Of a checkpoint directory; None where it has none. `InputError` for files that cannot be read."""
        path = Path(directory)
        config, special = (
            load_object(path / name) if (path / name).is_file() else {}
            for name in ("tokenizer_config.json", "special_tokens_map.json")
        )
        source: Any = config.get("chat_template")
        if (path / "chat_template.jinja").is_file():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(source, list):  # several by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if not source:
            return None
        named = {**config, **special}  # as in transformers, where the map wins
        tokens = {name: _content(named[name]) for name in SPECIAL if named.get(name) is not None}
        return cls(source, tokens, str(path))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the model continues with its answer. `InputError` where the template rejects the messages."""
        try:
            text: str = self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
            return text
        except Exception as error:  # a template raises what it likes
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"the chat template rejects the messages: {first}") from None


def _environment() -> Any:
    """What `transformers` gives a template besides its messages."""
    from jinja2 import nodes, parser
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks an answer for training; it is rendered as it is, in a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _reject
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reject(message: str) -> NoReturn:
    raise ValueError(message)
