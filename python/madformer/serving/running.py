"""The server as a process: it listens, and at SIGTERM finishes what it has before it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI

from madformer.serving.service import Service

logger = logging.getLogger("madformer.serving")

MAX_CONNECTIONS = 1024
"""Those beyond are answered 503 by uvicorn."""


class Server(uvicorn.Server):
    """Drains at the first signal, within the grace of its settings, and ends at the second."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        service: Service = app.state.service
        super().__init__(
            uvicorn.Config(
                app, host, port, log_config=None, access_log=False, server_header=False, timeout_keep_alive=30,
                # of connections that are left when all that was asked for is answered
                timeout_graceful_shutdown=2, limit_concurrency=MAX_CONNECTIONS,
            )
        )  # fmt: skip
        self.service = service
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn: a signal has come."""
        if self._draining is not None or not self.started:
            self.should_exit = self.force_exit = True
            return
        logger.info("draining", extra={"signal": signal.Signals(sig).name, "grace": self.service.settings.grace})
        self._draining = asyncio.get_event_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self.service.desk.drain(self.service.settings.grace)
        # answers that are on their way to the sockets
        await asyncio.sleep(0.1)
        self.should_exit = True


async def announce(server: Server, address: str) -> None:
    """Say where it is once it draws."""
    while not (server.started and server.service.desk.is_ready):
        if server.should_exit:
            return
        await asyncio.sleep(0.05)
    print(f"madformer serve: {address} draws; Ctrl-C ends it", flush=True)


def run(app: FastAPI, host: str, port: int) -> None:
    """Serve until a signal.

    Raises:
        OSError: the address cannot be listened at.
    """
    server = Server(app, host, port)
    socket = server.config.bind_socket()
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{socket.getsockname()[1]}"

    async def serve() -> None:
        telling = asyncio.create_task(announce(server, address))
        await server.serve([socket])
        telling.cancel()

    asyncio.run(serve())
