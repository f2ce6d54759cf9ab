"""Around every request: its id, its log line, and headers that browsers heed."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from madformer.serving.access import is_loopback
from madformer.serving.errors import ServingError
from madformer.serving.metrics import Metrics
from madformer.serving.telemetry import request_id

logger, faults = logging.getLogger("madformer.serving.access"), logging.getLogger("madformer.serving")

POLICY = "; ".join(
    (
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:",
        "connect-src 'self'", "font-src 'self'", "manifest-src 'self'", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'",
    )
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Around:
    """ASGI middleware.

    Args:
        local: no key is asked for, so that pages of other sites must be kept out: they reach a server on loopback
            through the browser of whoever looks at them.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, local: bool, origins: tuple[str, ...]) -> None:
        self.app, self.metrics, self.local, self.origins = app, metrics, local, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(name)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                for key, value in {**HEADERS, "X-Request-ID": name}.items():
                    out.setdefault(key, value)
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self.app(scope, receive, answer)
            except ServingError as error:
                await error_answer(error)(scope, receive, answer)
            except Exception as error:
                # here and not in a handler of the application's, whose answer would lack what is added above
                faults.error("a request failed", exc_info=error)
                if status:  # of an answer that has begun nothing can be said any more
                    raise
                await error_answer(ServingError.of(error))(scope, receive, answer)
        finally:
            self._note(scope, status, time.monotonic() - started)
            request_id.reset(token)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        if not self.local:
            return
        host = _name_of(headers.get("host", ""))
        if not is_loopback(host):
            raise ServingError(403, f"this server answers to localhost, not to {host[:64]!r}", "wrong_host")
        origin = headers.get("origin")
        foreign = origin is not None and origin not in self.origins
        if foreign and scope["method"] not in _SAFE_METHODS and urlsplit(origin).netloc != headers.get("host"):
            raise ServingError(403, "pages of other sites may not use this server", "wrong_origin")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = route_of(scope)
        # 0: the client was gone before there was an answer
        self.metrics.answers.labels(scope["method"] if scope["method"].isalpha() else "other", route, status).inc()
        client = scope.get("client") or ("", 0)
        values = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)}
        logger.info("answered", extra={**values, "client": client[0]})


def _name_of(host: str) -> str:
    """Of a header Host, without the port; empty where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def route_of(scope: Scope) -> str:
    """The pattern that the path matched: paths themselves may hold anything."""
    return getattr(scope.get("route"), "path", "none")


def error_answer(error: ServingError) -> JSONResponse:
    headers = dict(error.headers)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.error}, error.status, headers)
