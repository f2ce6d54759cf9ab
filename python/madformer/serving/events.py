"""What happens to a request, in order, for whoever listens, also later: server-sent events with growing ids.

A log belongs to the server's event loop and is bounded, whoever reads it or does not: of each image the last step alone
is kept, and of pictures of blocks so many bytes.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

HEARTBEAT = 15.0
"""Seconds after which a connection that has nothing to tell says that it is there."""
BLOCK_BYTES = 16 * 2**20
"""Of the blocks' pictures of one request."""


@dataclass(frozen=True)
class Event:
    """One of them; ``data`` is JSON."""

    number: int
    kind: str
    values: dict[str, Any]
    data: str = field(repr=False)

    @property
    def frame(self) -> bytes:
        return f"id: {self.number}\nevent: {self.kind}\ndata: {self.data}\n\n".encode()


@dataclass
class EventLog:
    """Events of one request. ``closed`` after the last one."""

    max_block_bytes: int = BLOCK_BYTES
    closed: bool = False
    _events: OrderedDict[int, Event] = field(default_factory=OrderedDict)
    _last: int = 0
    _steps: dict[int, int] = field(default_factory=dict)
    _block_bytes: int = 0
    _listeners: set[asyncio.Event] = field(default_factory=set)

    def publish(self, kind: str, values: dict[str, Any], *, last: bool = False) -> None:
        """Tell everybody."""
        assert not self.closed
        self._last += 1
        event = Event(self._last, kind, values, json.dumps(values, separators=(",", ":")))
        self._events[event.number] = event
        if kind == "step":
            # superseded: whoever has not read the one before does not miss it
            self._events.pop(self._steps.pop(values["index"], 0), None)
            self._steps[values["index"]] = event.number
        elif kind == "block":
            self._block_bytes += len(event.data)
            self._drop_blocks()
        self.closed = last
        for listener in self._listeners:
            listener.set()

    def _drop_blocks(self) -> None:
        for number, event in list(self._events.items()):
            if self._block_bytes <= self.max_block_bytes:
                return
            if event.kind == "block" and number != self._last:
                self._block_bytes -= len(event.data)
                del self._events[number]

    @property
    def nbytes(self) -> int:
        return sum(len(event.data) for event in self._events.values())

    def since(self, number: int) -> list[Event]:
        return [event for event in self._events.values() if event.number > number]

    async def follow(self, after: int = 0) -> AsyncIterator[Event | None]:
        """Events from the one behind ``after`` on, as they come; None after every ``HEARTBEAT`` without one."""
        news = asyncio.Event()
        self._listeners.add(news)
        try:
            while True:
                news.clear()
                for event in self.since(after):
                    after = event.number
                    yield event
                if self.closed and not self.since(after):
                    return
                if not news.is_set():
                    try:
                        await asyncio.wait_for(news.wait(), HEARTBEAT)
                    except TimeoutError:
                        yield None
        finally:
            self._listeners.discard(news)
