"""A client of ``madformer serve``: pictures, or what happens while they are made; by calls that wait, or by asyncio.

It needs httpx and Pillow, and neither PyTorch nor a model.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack
from urllib.parse import quote

from madformer.serving.client_events import (
    ApiError,
    Event,
    EventParser,
    ModelInfo,
    Picture,
    Status,
    UnavailableError,
    error_of,
    event_of,
    pictures_of,
)

try:
    import httpx
except ImportError as error:
    raise ImportError("the client needs httpx: pip install 'madformer[serve]'") from error

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AsyncClient", "Client", "ImageOptions"]

URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 10.0
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the tries to reach a server again whose connection broke."""

OVER = (404, 409)
"""What a server answers to the cancellation of a request that is over."""


class ImageOptions(TypedDict, total=False):
    """What may be asked for beside a prompt; a server refuses what its model cannot do.

    Attributes:
        label: of a class, its number or its name. seed: of the first image; image ``i`` has ``seed + i``.
        guidance_interval: lowest and highest timestep with guidance.
        priority: from -9 to 9, the lower the sooner. deadline: seconds, after which the server gives up.
        image, blocks: a picture, and places of its blocks that are drawn anew.
    """

    label: int | str
    negative_prompt: str
    num_images: int
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    seed: int
    scheduler: str
    priority: int
    deadline: float
    blocks: Sequence[int]
    image: Image | bytes | str | Path
    diffusion_layers: int
    refresh_every: int
    output_format: Literal["png", "webp", "jpeg"]


class _Call:
    """A request whose events are followed over however many connections it takes: what to send, and what came."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body, self.format = body, body.get("output_format", "png")
        self.id: str | None = None
        self.ended, self.failures = False, 0
        self.parser = EventParser()

    def next_request(self) -> dict[str, Any]:
        """Arguments of the request that begins, or that goes on after the last event."""
        headers = {"Accept": "text/event-stream"}
        if self.id is None:
            return {"method": "POST", "url": "api/v1/images", "json": self.body, "headers": headers}
        if self.parser.last_id is not None:
            headers["Last-Event-ID"] = self.parser.last_id
        self.parser.kind, self.parser.data = "", []
        return {"method": "GET", "url": f"{_path(self.id)}/events", "headers": headers}

    def feed(self, line: str) -> Iterator[Event]:
        for kind, data in self.parser.feed(line):
            self.id, self.failures = data.get("id", self.id), 0
            # an error without an image's number ends the request, as does what follows it
            self.ended = kind == "done" or (kind == "error" and data.get("index") is None)
            if (event := event_of(kind, data, self.format)) is not None:
                yield event

    def wait_after(self, error: Exception | None) -> float:
        """Seconds until the next try; raises where there is none."""
        if self.id is None or self.failures == len(WAITS):
            raise error if isinstance(error, UnavailableError) else _unreachable(error)
        self.failures += 1
        return WAITS[self.failures - 1]


class Client:
    """Talks to a server, by calls that wait. Close it, or use it in a ``with`` statement; threads may share it.

    Args:
        url: of the server, with a path where a proxy serves it under one.
        api_key: where the server asks for one.
        timeout: httpx's; unless given, a connection has ten seconds to come about, and an answer all the time it takes.
        transport: httpx's, to reach a server by other ways than the network.

    Raises:
        In every call: BusyError, UnavailableError, ApiError for every other refusal.
    """

    def __init__(
        self,
        url: str = URL,
        api_key: str | None = None,
        *,
        timeout: httpx.Timeout | float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**_settings(url, api_key, timeout), transport=transport)

    def images(self, prompt: str | None = None, **options: Unpack[ImageOptions]) -> list[Picture]:
        """Draw pictures, and give them when all are done.

        Raises:
            IncompleteError: some of them could not be drawn.
        """
        return pictures_of(self._ask("POST", "api/v1/images", json=_body(prompt, options)).json())

    def stream(self, prompt: str | None = None, **options: Unpack[ImageOptions]) -> Iterator[Event]:
        """Draw pictures, and give what happens as it happens; the last event is :class:`Done`.

        A broken connection is made again, and goes on after the event that came last. Leaving the iterator cancels the
        request.
        """
        call = _Call(_body(prompt, options))
        try:
            while not call.ended:
                broken: Exception | None = None
                try:
                    with self._http.stream(**call.next_request()) as response:
                        if response.is_error:
                            response.read()
                            raise _refusal(response)
                        for line in response.iter_lines():
                            yield from call.feed(line)
                            if call.ended:
                                return
                except (httpx.TransportError, UnavailableError) as error:
                    broken = error
                time.sleep(call.wait_after(broken))
        except GeneratorExit:
            if call.id is not None and not call.ended:
                with contextlib.suppress(ApiError):
                    self.cancel(call.id)
            raise

    def cancel(self, id: str) -> bool:
        """Cancel a request; False where it is over or not known."""
        try:
            self._ask("DELETE", _path(id))
        except ApiError as error:
            if error.status in OVER:
                return False
            raise
        return True

    def model(self) -> ModelInfo:
        """What the server draws with."""
        return self._ask("GET", "api/v1/model").json()

    def status(self) -> Status:
        """How busy the server is."""
        return self._ask("GET", "api/v1/status").json()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **given)
        except httpx.TransportError as error:
            raise _unreachable(error) from error
        if response.is_error:
            raise _refusal(response)
        return response


class AsyncClient:
    """As :class:`Client`, for asyncio: ``async with``, ``await`` and ``async for``."""

    def __init__(
        self,
        url: str = URL,
        api_key: str | None = None,
        *,
        timeout: httpx.Timeout | float | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**_settings(url, api_key, timeout), transport=transport)

    async def images(self, prompt: str | None = None, **options: Unpack[ImageOptions]) -> list[Picture]:
        """As :meth:`Client.images`."""
        return pictures_of((await self._ask("POST", "api/v1/images", json=_body(prompt, options))).json())

    async def stream(self, prompt: str | None = None, **options: Unpack[ImageOptions]) -> AsyncIterator[Event]:
        """As :meth:`Client.stream`; an iterator that is left early should be closed with ``aclose``."""
        call = _Call(_body(prompt, options))
        try:
            while not call.ended:
                broken: Exception | None = None
                try:
                    async with self._http.stream(**call.next_request()) as response:
                        if response.is_error:
                            await response.aread()
                            raise _refusal(response)
                        async for line in response.aiter_lines():
                            for event in call.feed(line):
                                yield event
                            if call.ended:
                                return
                except (httpx.TransportError, UnavailableError) as error:
                    broken = error
                await asyncio.sleep(call.wait_after(broken))
        except (GeneratorExit, asyncio.CancelledError):
            if call.id is not None and not call.ended:
                with contextlib.suppress(ApiError):
                    await asyncio.shield(self.cancel(call.id))
            raise

    async def cancel(self, id: str) -> bool:
        """As :meth:`Client.cancel`."""
        try:
            await self._ask("DELETE", _path(id))
        except ApiError as error:
            if error.status in OVER:
                return False
            raise
        return True

    async def model(self) -> ModelInfo:
        """As :meth:`Client.model`."""
        return (await self._ask("GET", "api/v1/model")).json()

    async def status(self) -> Status:
        """As :meth:`Client.status`."""
        return (await self._ask("GET", "api/v1/status")).json()

    async def aclose(self) -> None:
        """As :meth:`Client.close`."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.aclose()

    async def _ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **given)
        except httpx.TransportError as error:
            raise _unreachable(error) from error
        if response.is_error:
            raise _refusal(response)
        return response


def _settings(url: str, api_key: str | None, timeout: httpx.Timeout | float | None) -> dict[str, Any]:
    headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    wait = httpx.Timeout(None, connect=CONNECT_SECONDS) if timeout is None else timeout
    return {"base_url": url, "headers": headers, "timeout": wait}


def _path(id: str) -> str:
    return f"api/v1/images/{quote(id, safe='')}"


def _body(prompt: str | None, options: ImageOptions) -> dict[str, Any]:
    body: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    body |= options
    if "blocks" in body:
        body["blocks"] = list(body["blocks"])
    if "image" in body:
        body["image"] = base64.b64encode(_file_of(body["image"])).decode()
    return body


def _file_of(image: Image | bytes | str | Path) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return Path(image).read_bytes()
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _refusal(response: httpx.Response) -> ApiError:
    return error_of(response.status_code, response.content, response.headers.get("Retry-After"))


def _unreachable(error: Exception | None) -> UnavailableError:
    return UnavailableError(f"the server does not answer: {error or 'the connection ended'}")
