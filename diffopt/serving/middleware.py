"""What every request passes before it is looked at: the clock, the token, the size of its body."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffopt.serving.metrics import Metrics
from diffopt.serving.protocol import ApiError

_DISCARDED = 64 << 20
"""Bytes above the limit that are read nevertheless: a client that still sends sees no answer."""


def answer(error: ApiError) -> JSONResponse:
    """Return the response that an error is."""
    return JSONResponse(error.body, error.status, error.headers)


class Measured:
    """Counts requests by path and status, and takes their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499  # where the client goes before there is an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            # A path that the caller makes up would be a new row for each.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)


class BearerToken:
    """Lets nobody in without the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not _is_open(scope["path"]):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "a bearer token is needed", code="invalid_api_key")
                error.headers = {"WWW-Authenticate": "Bearer"}
                await answer(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    """Tell whether a path needs no token; files have names that nobody can guess."""
    return path in ("/", "/health") or path.startswith("/v1/files/")


class BodyLimit:
    """Reads a request's body whole, within a size and a time, before anything else sees it."""

    def __init__(self, app: ASGIApp, limit: Callable[[str], int], seconds: float) -> None:
        """Guard an app.

        Args:
            app: The app.
            limit: The most bytes of a body, by path.
            seconds: The most time that a client may take.
        """
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit(scope["path"])
        try:
            async with asyncio.timeout(self._seconds):
                body = await _read(receive, limit)
        except TimeoutError:
            error = ApiError(408, f"the request did not arrive within {self._seconds:g} s")
            error.headers = {"Connection": "close"}
            await answer(error)(scope, receive, send)
            return
        except ApiError as error:
            await answer(error)(scope, receive, send)
            return
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replayed, send)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """Return the body; None where the client goes away. One above the limit is an `ApiError`."""
    parts: list[bytes] = []
    size = 0
    while (message := await receive())["type"] == "http.request":
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False) or size > limit + _DISCARDED:
            if size > limit:
                raise ApiError(413, f"the request is larger than {limit / (1 << 20):.3g} MB")
            return b"".join(parts)
    return None
