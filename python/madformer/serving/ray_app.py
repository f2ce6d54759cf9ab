"""Many machines behind one address, by Ray Serve.

Engines each hold a model and the whole application of :func:`madformer.serving.create_app`. Fronts take HTTP apart: a
request goes to an engine that has little to do, or to the one that knows its id, and the answer comes back as it is
made. Where an engine is lost, a request whose answer had not begun is given to another one; a stream that had begun
ends with an ``error`` event.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from madformer.arguments import whole_number
from madformer.cluster import joined, share_of
from madformer.serving.errors import ServingError
from madformer.serving.middleware import error_answer
from madformer.serving.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["ClusterSettings", "application", "run"]

logger = logging.getLogger("madformer.serving")

NAME = "madformer"
"""Of the application; its deployments are ``front`` and ``engine``."""
ROUTER = "madformer.serving.ray_router.Router"
TRIES = 3
"""Engines that a request is given to, one after the other, before it is answered that they were lost."""
WARM_UP_SECONDS = 0.05
BROADCAST_SECONDS = 10.0
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
OWNED = re.compile(r"/api/v1/images/([^/]+)(?:/events)?|/v1/files/images/([^/]+)")
"""Paths of what one engine has, and no other."""
SUMS = ("waiting", "running", "slots", "steps_per_second", "images_done")

Message = MutableMapping[str, Any]


def status_of_all(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of engines, one at least, what ``GET /api/v1/status`` tells of each."""
    total: dict[str, Any] = {name: sum(one[name] for one in found) for name in SUMS}
    total["ready"] = any(one["ready"] for one in found)
    total["draining"] = all(one["draining"] for one in found)
    total["batch_fill"] = sum(one["batch_fill"] * one["slots"] for one in found) / total["slots"]
    total["seconds_per_image"] = sum(one["seconds_per_image"] for one in found) / len(found)
    # of those that draw, by how much
    speeds = sum(one["step_seconds"] * one["steps_per_second"] for one in found)
    total["step_seconds"] = speeds / total["steps_per_second"] if total["steps_per_second"] else 0.0
    return total


@dataclass(frozen=True)
class ClusterSettings:
    """How an application is spread over a cluster.

    Attributes:
        min_replicas, max_replicas: engines; between them there are as many as the queue asks for.
        num_gpus, num_cpus: of an engine. fronts: processes that take requests apart, which need little.

    Raises:
        ValueError: numbers that make no sense.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    num_gpus: float = 0
    num_cpus: float = 1
    fronts: int = 1

    def __post_init__(self) -> None:
        for name in ("min_replicas", "max_replicas", "fronts"):
            whole_number(name, getattr(self, name), 1)
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} must be at least min_replicas={self.min_replicas}")


class Engine:
    """A replica: an application in a process that has a model.

    Args:
        make_app: makes it, in this process, with its model on its device.
    """

    # Serve waits for it
    async def __init__(self, make_app: Callable[[], FastAPI]) -> None:  # type: ignore[misc]
        from ray import serve

        self.name = serve.get_replica_context().replica_id.unique_id
        self.app = await asyncio.to_thread(make_app)
        self.tasks: set[asyncio.Task[None]] = set()
        self.stack = contextlib.AsyncExitStack()
        await self.stack.enter_async_context(self.app.router.lifespan_context(self.app))
        self.service = self.app.state.service
        while not self.service.desk.is_ready:
            await self.check_health()
            await asyncio.sleep(WARM_UP_SECONDS)

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica where this raises."""
        if not self.service.desk.stepper.is_alive:
            raise RuntimeError("the thread that draws ended")

    async def __del__(self) -> None:
        if hasattr(self, "service"):
            await self.service.desk.drain(self.service.settings.grace)
            await self.stack.aclose()

    async def respond(self, scope: dict[str, Any], body: bytes, *, to: str | None = None) -> AsyncIterator[Message]:
        """The application's answer, message by message. ``to`` is read by ``ray_router``."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue(64)
        gone, asked = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await gone.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            if not gone.is_set():
                await messages.put(message)

        async def run() -> None:
            try:
                await self.app(scope, receive, send)
            finally:
                await messages.put(None)

        task = asyncio.create_task(run())
        self.tasks.add(task)
        task.add_done_callback(self._over)
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            gone.set()
            while not messages.empty():
                messages.get_nowait()

    def _over(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a request failed", exc_info=error)

    async def holds(self, name: str) -> str | None:
        """This replica's name, if it has the request or the picture of that id."""
        return self.name if name in self.service.desk.generations or name in self.service.files else None

    async def status(self) -> dict[str, Any]:
        """The service's, and which process this is."""
        return {**self.service.status(), "replica": self.name, "pid": os.getpid()}


class Front:
    """Takes requests apart, and gives back what engines answer.

    Args:
        engine: Serve's handle of the engines.
        max_body: bytes of a request.
    """

    def __init__(self, engine: Any, max_body: int) -> None:
        self.engine, self.max_body = engine, max_body

    def __serve_build_asgi_app__(self) -> Starlette:
        """Of Ray Serve: what it serves."""
        return Starlette(
            routes=[
                Route("/healthz", self.health),
                Route("/readyz", self.ready),
                Route("/api/v1/status", self.status),
                Route("/metrics", self.metrics),
                Route("/{path:path}", self.answer, methods=METHODS),
            ],
            exception_handlers={ServingError: _tell},
        )

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        is_ready = any(one["ready"] for one in await self._all("status"))
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def status(self, request: Request) -> Response:
        """That of all engines together, for whom one of them would tell its own."""
        if (answer := await self.answer(request)).status_code != 200 or not (found := await self._all("status")):
            return answer
        total = status_of_all(found)
        headers = {
            name: value for name, value in answer.headers.items() if name not in ("content-length", "content-type")
        }
        return JSONResponse(total | {"engines": len(found)}, headers=headers)

    async def metrics(self, request: Request) -> Response:
        """Of one engine they would be mistaken for all: each has a page of its own at Ray's metrics."""
        raise ServingError(404, "the engines' metrics are not told here: GET /api/v1/status sums them up", "not_found")

    async def answer(self, request: Request) -> Response:
        """What an engine answers."""
        body, to = await self._body(request), None
        if owned := OWNED.fullmatch(request.url.path):
            holders = await self._all("holds", owned[1] or owned[2])
            to = next((holder for holder in holders if holder is not None), None)
        for _ in range(TRIES):
            try:
                return await self._ask(_plain(request), body, to)
            except _lost() as error:
                logger.warning("an engine was lost, and its request goes to another", exc_info=error)
        raise _lost_error()

    async def _ask(self, scope: dict[str, Any], body: bytes, to: str | None) -> Response:
        from ray.serve.exceptions import BackPressureError

        messages = self.engine.options(stream=True).respond.remote(scope, body, to=to)
        try:
            start = await anext(messages)
        except BackPressureError as error:
            raise ServingError.busy("as many requests wait as may", 5.0) from error
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
        if headers.get("content-type", "").startswith("text/event-stream"):
            return StreamingResponse(_relayed(messages), start["status"], headers)
        # whole before any of it is passed on, so that it can be asked for again
        content = b"".join([message.get("body", b"") async for message in messages])
        response = Response(content, start["status"])
        response.raw_headers = start["headers"]
        return response

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.max_body:
                raise ServingError(413, f"the body has more than {self.max_body} bytes", "body_too_large")
            parts.append(part)
        return b"".join(parts)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        """What the engines say that answer."""
        silent: tuple[type[Exception], ...] = (TimeoutError, *_lost())
        try:
            asked = self.engine.broadcast(method, *arguments)
            found = await asked.results_async(timeout_s=BROADCAST_SECONDS, return_exceptions=True)
        except silent as error:
            logger.warning("the engines do not answer", exc_info=error)
            return []
        return [one for one in found if not isinstance(one, BaseException)]


async def _relayed(messages: Any) -> AsyncIterator[bytes]:
    """A stream's bytes; an ``error`` event at their end where the engine is lost."""
    name = None
    try:
        async for message in messages:
            body: bytes = message.get("body", b"")
            if name is None and (found := re.search(rb'"id":"([^"]+)"', body)):
                name = found[1].decode()
            yield body
    except _lost() as error:
        logger.warning("an engine was lost while it answered", exc_info=error)
        data = json.dumps({"id": name, "type": "error", "error": _lost_error().error}, separators=(",", ":"))
        yield f"\n\nevent: error\ndata: {data}\n\n".encode()
    finally:
        messages.cancel()


def application(make_app: Callable[[], FastAPI], settings: ServerSettings, cluster: ClusterSettings) -> Any:
    """A Ray Serve application, for ``serve.run`` and ``serve deploy``.

    Args:
        make_app: makes an engine's application, with its model, where the engine is; it is pickled.
        settings: that those are made with.

    Raises:
        ImportError: Ray Serve is not installed.
    """
    try:
        from ray import serve
        from ray.serve.config import RequestRouterConfig
    except ImportError as error:
        raise ImportError("Ray Serve is not installed: pip install 'madformer[cluster]'") from error
    room = settings.slots + settings.max_waiting
    size: dict[str, Any] = {"num_replicas": cluster.min_replicas}
    if cluster.max_replicas > cluster.min_replicas:
        size = {
            "autoscaling_config": {
                "min_replicas": cluster.min_replicas,
                "max_replicas": cluster.max_replicas,
                "target_ongoing_requests": settings.slots,
            }
        }
    engine = serve.deployment(
        Engine,
        name="engine",
        ray_actor_options={"num_gpus": cluster.num_gpus, "num_cpus": cluster.num_cpus},
        max_ongoing_requests=room,
        max_queued_requests=room,
        graceful_shutdown_timeout_s=settings.grace + 5,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **size,
    )
    front = serve.deployment(
        serve.ingress()(Front),
        name="front",
        num_replicas=cluster.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.grace + 5,
    )
    return front.bind(engine.bind(make_app), settings.max_body)


def run(
    make_app: Callable[[], FastAPI],
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    replicas: int | None = None,
    max_replicas: int | None = None,
    on_gpu: bool = False,
) -> None:
    """Serve on the cluster that ``RAY_ADDRESS`` names, or on one of this machine, until SIGINT or SIGTERM.

    Args:
        make_app, settings: as those of :func:`application`.
        replicas: engines; None for one a GPU of the cluster, or one without.
        max_replicas: engines that there may become as requests wait; None for no more than ``replicas``.
        on_gpu: give each engine a GPU.

    Raises:
        ImportError: Ray Serve is not installed. ValueError: the cluster has no GPU. RuntimeError: no engine starts.
    """
    with joined("cluster"):
        share = share_of(replicas, on_gpu=on_gpu)
        cluster = ClusterSettings(
            share.workers, max_replicas or share.workers, num_gpus=share.num_gpus or 0, num_cpus=share.num_cpus or 1
        )
        deployed = application(make_app, settings, cluster)
        from ray import serve

        serve.start(http_options={"host": host, "port": port})
        try:
            serve.run(deployed, name=NAME, route_prefix="/")
            shown = f"[{host}]" if ":" in host else host
            print(
                f"madformer serve: http://{shown}:{port} draws by {share.workers} engines; Ctrl-C ends it", flush=True
            )
            ended = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: ended.set())
            ended.wait()
        finally:
            serve.shutdown()


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises where a replica died, or cannot be reached."""
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import ReplicaUnavailableError

    return RayActorError, ReplicaUnavailableError


def _lost_error() -> ServingError:
    return ServingError.unavailable("the engine that drew this was lost: ask again", "engine_lost")


def _plain(request: Request) -> dict[str, Any]:
    """Of an ASGI scope what another process can have."""
    names = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
             "client", "server")  # fmt: skip
    return {name: request.scope[name] for name in names if name in request.scope}


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    return error_answer(error)
