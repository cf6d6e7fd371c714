"""Errors of the HTTP side as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from hetkv.errors import ApiError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """`{"error": ...}`."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: ApiError) -> dict[str, Any]:
    """The same of an exception."""
    return error_body(error.status, str(error), error.code, error.param)
