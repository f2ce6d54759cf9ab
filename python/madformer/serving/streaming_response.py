"""An answer of server-sent events, to a client that may read slowly, never, or go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends what ``frames`` gives, and closes it when the client goes away or takes nothing for ``stall`` seconds."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], stall: float) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.frames, self.stall = frames, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, gone):
                task.cancel()
            results = await asyncio.gather(sending, gone, return_exceptions=True)
        if isinstance(results[0], Exception) and not isinstance(results[0], TimeoutError):
            raise results[0]

    async def _send(self, send: Send) -> None:
        async with contextlib.aclosing(self.frames) as frames:  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for frame in frames:
                part = {"type": "http.response.body", "body": frame, "more_body": True}
                await asyncio.wait_for(send(part), self.stall)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def or_gone(event: asyncio.Event, receive: Receive) -> bool:
    """Wait for it, or until the client goes away; whether it came."""
    waiting, gone = asyncio.ensure_future(event.wait()), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        return event.is_set()
    finally:
        for task in (waiting, gone):
            task.cancel()
