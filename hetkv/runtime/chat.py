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
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _reject
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"{origin}: its chat template is no Jinja: {error}") from None
        self._tokens = dict(tokens)

    @classmethod
    def load(cls, directory: str | Path) -> ChatTemplate | None:
        """Of a checkpoint directory; None where it has none. `InputError` for files that cannot be read."""
        path = Path(directory)
        config = load_object(path / "tokenizer_config.json") if (path / "tokenizer_config.json").is_file() else {}
        source: Any = config.get("chat_template")
        if (path / "chat_template.jinja").is_file():
            source = (path / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(source, list):  # several by name
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if not source:
            return None
        tokens = {name: _content(config[name]) for name in SPECIAL if config.get(name) is not None}
        return cls(source, tokens, str(path))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that the model continues with its answer. `InputError` where the template rejects the messages."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template raises what it likes
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"the chat template rejects the messages: {first}") from None


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _reject(message: str) -> NoReturn:
    raise ValueError(message)
