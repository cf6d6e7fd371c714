"""OpenAI's requests as this server understands them: `Call`, made of a body. What is not understood is an error.

vLLM's `top_k` and `ignore_eos` are taken, too. Fields whose effect is not implemented are taken where their value asks
for nothing, as clients send them so.
"""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

from hetkv.errors import ApiError
from hetkv.runtime.sampling import Sampling

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
"""Fields that are known, and the values (and null) that change nothing."""
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,)}
"""The same of one kind of request."""
IGNORED = ("metadata", "prompt_cache_key", "request_id", "safety_identifier", "user")
"""Fields that say something about the client and change nothing."""
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 32, 16, 20
MOST_SEQUENCES = 2048
"""Choices of all prompts of a request."""
SEEDS = -(1 << 63), (1 << 63) - 1
COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` of a completion."""


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None


class _Completion(_Body, forbid_unknown_fields=True, kw_only=True):
    prompt: Any
    logprobs: int | None = None


class _Chat(_Body, forbid_unknown_fields=True, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `max_tokens` None: up to the end of the context."""

    chat: bool
    model: str
    prompts: tuple[str | tuple[int, ...], ...]
    """Texts or token ids; none where there are `messages`."""
    messages: tuple[dict[str, Any], ...]
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    """Tell the number of tokens at the end of a stream."""
    continuous_usage: bool
    logprobs: int
    """Likeliest tokens to tell; -1: no logprobs at all."""
    sampling: Sampling
    """Of the first choice; each further one has the next seed."""


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises `ApiError`."""
    try:
        document = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body has too many lists and objects inside of each other") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body is not a JSON object")
    return document


def parse(body: bytes, chat: bool) -> Call:
    """The call that a body asks for. Raises `ApiError`."""
    document = json_object(body)
    _check_neutral(document, {**NEUTRAL, **(NEUTRAL_CHAT if chat else NEUTRAL_COMPLETION)})
    kind = _Chat if chat else _Completion
    try:
        fields: Any = msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    call = _chat(fields) if chat else _completion(fields)
    _check_ranges(fields)
    return call


def _check_neutral(document: dict[str, Any], neutral: dict[str, tuple[Any, ...]]) -> None:
    for name in IGNORED:
        document.pop(name, None)
    for name, values in neutral.items():
        if name in document:
            value = document.pop(name)
            if value is not None and value not in values:
                raise ApiError(400, f"{name}: {value!r} is not supported here", param=name, code="unsupported_value")


def _invalid(error: msgspec.ValidationError) -> ApiError:
    """msgspec's text and the field that it names."""
    text, _, place = str(error).partition(" - at `$")
    within = place.strip("`.")
    if "unknown field" in text:
        name = f"{within}." * bool(within) + text.split("`")[1]
        return ApiError(400, f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")
    if "missing required field" in text:
        name = text.split("`")[1]
        return ApiError(400, f"{name} is missing", param=name, code="missing_required_parameter")
    field = within.split(".")[0].split("[")[0]
    return ApiError(400, f"{field}: {text[0].lower()}{text[1:]}" if field else text, param=field or None)


def _check_ranges(fields: Any) -> None:
    ranges = [("temperature", 0, 2), ("top_p", 0, 1), ("n", 1, MOST_CHOICES), ("max_tokens", 1, 1 << 31)]
    ranges += [("seed", *SEEDS)]
    if isinstance(fields, _Chat):
        ranges += [("max_completion_tokens", 1, 1 << 31), ("top_logprobs", 0, MOST_LOGPROBS)]
    else:
        ranges += [("logprobs", 0, MOST_LOGPROBS)]
    for name, low, high in ranges:
        value = getattr(fields, name)
        if value is not None and not low <= value <= high:
            raise ApiError(400, f"{name} must be between {low} and {high}, not {value}", param=name)
    if fields.top_p == 0:
        raise ApiError(400, "top_p must be greater than 0", param="top_p")
    if fields.top_k is not None and fields.top_k < -1:
        raise ApiError(400, f"top_k must be at least 1, or 0 or -1 for all tokens, not {fields.top_k}", param="top_k")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options goes with stream", param="stream_options")


def _completion(fields: _Completion) -> Call:
    prompt = fields.prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise ApiError(400, "prompt must be a text, token ids, or a list of these", param="prompt")
    prompts = tuple(_prompt(one) for one in prompt)
    logprobs = -1 if fields.logprobs is None else fields.logprobs
    most = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    return _call(fields, False, prompts, (), most, logprobs)


def _prompt(one: Any) -> str | tuple[int, ...]:
    if isinstance(one, str):
        if not one:
            raise ApiError(400, "prompt is empty", param="prompt")
        return one
    if not isinstance(one, list) or not one or not all(type(token) is int for token in one):
        raise ApiError(400, "prompt must be a text, token ids, or a list of these", param="prompt")
    return tuple(one)


def _chat(fields: _Chat) -> Call:
    if not fields.messages:
        raise ApiError(400, "messages is empty", param="messages")
    messages = tuple(_message(message, number) for number, message in enumerate(fields.messages))
    if fields.top_logprobs is not None and not fields.logprobs:
        raise ApiError(400, "top_logprobs goes with logprobs", param="top_logprobs")
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else -1
    most = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    return _call(fields, True, (), messages, most, logprobs)


def _message(message: dict[str, Any], number: int) -> dict[str, Any]:
    """A message with its content as one text."""
    content = message.get("content")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise ApiError(400, f"messages[{number}]: only text is understood", param="messages")
        if any(not isinstance(part.get("text"), str) for part in content):
            raise ApiError(400, f"messages[{number}]: a part of type text must have a text", param="messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(message.get("role"), str) or not isinstance(content, str):
        raise ApiError(400, f"messages[{number}] must have a role and a content", param="messages")
    return {**message, "content": content}


def _call(
    fields: _Body,
    chat: bool,
    prompts: tuple[str | tuple[int, ...], ...],
    messages: tuple[dict[str, Any], ...],
    max_tokens: int | None,
    logprobs: int,
) -> Call:
    stop = fields.stop if isinstance(fields.stop, list) else [] if fields.stop is None else [fields.stop]
    if len(stop) > MOST_STOPS or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(400, f"stop must be a text or a list of up to {MOST_STOPS} texts", param="stop")
    if len(prompts) * (fields.n or 1) > MOST_SEQUENCES:
        raise ApiError(
            400,
            f"a request may have {MOST_SEQUENCES} choices, not {len(prompts)} prompts with {fields.n or 1} each",
            param="prompt",
        )
    options = fields.stream_options or StreamOptions()
    sampling = Sampling(
        max_tokens=max_tokens or 1,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_k=max(fields.top_k or 0, 0),
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=secrets.randbits(48) if fields.seed is None else fields.seed,
        logprobs=logprobs,
        ignore_eos=bool(fields.ignore_eos),
    )
    return Call(
        chat=chat, model=fields.model, prompts=prompts, messages=messages, max_tokens=max_tokens, n=fields.n or 1,
        stop=tuple(stop), stream=bool(fields.stream), usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats, logprobs=logprobs, sampling=sampling,
    )  # fmt: skip
