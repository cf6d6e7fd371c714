"""The HTTP side: OpenAI's endpoints over any engines, and health."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from hetkv.errors import ApiError, GenerationError, InputError
from hetkv.serve.errors import body_of, error_body
from hetkv.serve.limits import RETRY_AFTER_S


class Engines(Protocol):
    """What answers requests: hetkv's own instances, or another engine's servers."""

    async def complete(self, request: Request, body: bytes, chat: bool) -> Response:
        """Answer one request. Raises `ApiError`."""

    async def models(self) -> dict[str, Any]:
        """OpenAI's list."""

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests can be answered, and why or why not."""


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, or None where the client closes its connection first: `work` is given up then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.wait((working,))
        return None
    finally:
        leaving.cancel()
        working.cancel()


def application(engines: Engines, lifespan: Callable[[FastAPI], Any] | None = None) -> FastAPI:
    """OpenAI's endpoints over `engines`."""
    app = FastAPI(title="hetkv", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await engines.complete(request, await request.body(), chat=False)

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> Response:
        return await engines.complete(request, await request.body(), chat=True)

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(await engines.models())

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        found = [one for one in (await engines.models())["data"] if one["id"] == name]
        if not found:
            raise ApiError(404, f"The model `{name}` does not exist", code="model_not_found", param="model")
        return JSONResponse(found[0])

    @app.get("/health")
    async def health() -> JSONResponse:
        ready, detail = await engines.health()
        return JSONResponse({"status": "ok" if ready else "waiting", **detail}, 200 if ready else 503)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return _error(error.status, body_of(error))

    @app.exception_handler(GenerationError)
    async def on_failure(_: Request, error: GenerationError) -> JSONResponse:
        return _error(500, error_body(500, str(error)))

    @app.exception_handler(InputError)
    async def on_input_error(_: Request, error: InputError) -> JSONResponse:
        return _error(400, error_body(400, str(error)))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if error.status_code in (404, 405):
            text = f"Invalid URL ({request.method} {request.url.path})"
        return _error(error.status_code, error_body(error.status_code, text))

    @app.exception_handler(Exception)
    async def on_fault(_: Request, error: Exception) -> JSONResponse:
        return _error(500, error_body(500, f"{type(error).__name__} in the server"))

    return app


def _error(status: int, body: dict[str, Any]) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(body, status, headers)
