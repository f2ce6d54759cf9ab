"""The client against a server that answers as it is told: what it sends, what it reads, and how it goes on."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from madformer.serving import client as module  # noqa: E402
from madformer.serving.client import AsyncClient, Client  # noqa: E402
from madformer.serving.client_events import (  # noqa: E402
    ApiError,
    Block,
    BusyError,
    Done,
    Event,
    Failed,
    Finished,
    IncompleteError,
    ModelInfo,
    Queued,
    Started,
    Status,
    Step,
    UnavailableError,
)

Handler = Callable[[httpx.Request], httpx.Response]


def encoded(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("queued", {"id": "a/1", "position": 2, "estimated_seconds": 1.5}),
    ("started", {"id": "a/1", "index": 0}),
    ("step", {"id": "a/1", "index": 0, "block": 3, "step": 1, "num_steps": 2, "fraction": 0.5, "new_field": 1}),
    ("block", {"id": "a/1", "index": 0, "block": 3, "order": 0, "num_blocks": 4, "box": [4, 4, 4, 4],
               "b64_json": encoded("red"), "output_format": "png"}),
    ("unheard_of", {"id": "a/1"}),
    ("error", {"id": "a/1", "index": 1, "error": {"message": "not finite", "type": "server_error", "code": "nan"}}),
    ("finished", {"id": "a/1", "index": 0, "seed": 2**62 + 1, "b64_json": encoded("blue")}),
    ("done", {"id": "a/1", "seconds": 2.5}),
]  # fmt: skip


def frames(first: int = 1, last: int = len(EVENTS)) -> bytes:
    """Events from ``first`` to ``last``, counted from 1, with the comment that keeps connections open."""
    parts = [
        f"id: {number}\r\nevent: {kind}\r\ndata: {json.dumps(data)}\r\n\r\n"
        for number, (kind, data) in enumerate(EVENTS, 1)
        if first <= number <= last
    ]
    return ": here\n\n".join(parts).encode()


class Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that ends in the middle, with an error of the connection or without."""

    def __init__(self, content: bytes, *, loudly: bool) -> None:
        self.content, self.loudly = content, loudly

    def __iter__(self) -> Iterator[bytes]:
        yield from (self.content[at : at + 97] for at in range(0, len(self.content), 97))
        if self.loudly:
            raise httpx.ReadError("reset by peer")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self:
            yield part


def streamed(handler: Handler, *, wait: bool, **options: Any) -> list[Event]:
    """All events, by calls that wait or by asyncio."""
    transport = httpx.MockTransport(handler)
    if wait:
        with Client("http://server/under/", "secret", transport=transport) as client:
            return list(client.stream("red apple", **options))

    async def collect() -> list[Event]:
        async with AsyncClient("http://server/under/", "secret", transport=transport) as client:
            return [event async for event in client.stream("red apple", **options)]

    return asyncio.run(collect())


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.0, 0.0))


def test_pictures_come_as_the_server_made_them(tmp_path: Any) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        images = [{"index": i, "seed": 7 + i, "b64_json": encoded(colour)} for i, colour in enumerate(("red", "blue"))]
        return httpx.Response(200, json={"id": "1", "images": images})

    with Client("http://server/under", "secret", transport=httpx.MockTransport(answer)) as client:
        picture = Image.new("RGB", (8, 8), "white")
        first, second = client.images("red apple", num_images=2, seed=7, image=picture, blocks=range(2, 4))
    (request,) = asked
    assert (request.method, request.url.path) == ("POST", "/under/api/v1/images")
    assert request.headers["Authorization"] == "Bearer secret"
    assert request.headers["Accept"] == "application/json"
    body = json.loads(request.content)
    sent = Image.open(io.BytesIO(base64.b64decode(body.pop("image"))))
    assert sent.getcolors() == [(64, (255, 255, 255))]
    assert body == {"prompt": "red apple", "num_images": 2, "seed": 7, "blocks": [2, 3]}

    assert [(one.index, one.seed, one.image.getpixel((3, 3))) for one in (first, second)] == [
        (0, 7, (255, 0, 0)),
        (1, 8, (0, 0, 255)),
    ]
    second.save(tmp_path / "second.png")
    assert (tmp_path / "second.png").read_bytes() == base64.b64decode(encoded("blue"))


@pytest.mark.parametrize("wait", [True, False], ids=["sync", "async"])
def test_events_have_types(wait: bool) -> None:
    events = streamed(lambda _: httpx.Response(200, content=frames()), wait=wait)
    assert [type(event) for event in events] == [Queued, Started, Step, Block, Failed, Finished, Done]
    queued, _, step, block, failed, finished, done = events
    assert queued == Queued("a/1", 2, 1.5)
    assert step == Step("a/1", 0, 3, 1, 2, 0.5)
    assert isinstance(block, Block)
    assert (block.block, block.order, block.box, block.image.getpixel((0, 0))) == (3, 0, (4, 4, 4, 4), (255, 0, 0))
    assert isinstance(failed, Failed)
    assert (failed.index, str(failed.error), failed.error.code) == (1, "not finite", "nan")
    assert isinstance(finished, Finished)
    assert (finished.picture.seed, finished.picture.image.getpixel((0, 0))) == (2**62 + 1, (0, 0, 255))
    assert done == Done("a/1", 2.5)


@pytest.mark.parametrize("wait", [True, False], ids=["sync", "async"])
@pytest.mark.parametrize("loudly", [True, False], ids=["reset", "cut"])
def test_a_broken_connection_goes_on_where_it_was(wait: bool, loudly: bool) -> None:
    """Cut after every byte of an event's frame, also behind the line that has its id; nothing comes twice or never."""
    whole = streamed(lambda _: httpx.Response(200, content=frames()), wait=wait)
    for cut in (1, 8, 22, 60, len(frames(3, 3)) - 2):
        asked: list[tuple[str, str, str | None]] = []

        def answer(request: httpx.Request, asked: list[Any] = asked, cut: int = cut) -> httpx.Response:
            asked.append((request.method, request.url.raw_path.decode(), request.headers.get("Last-Event-ID")))
            if len(asked) == 1:
                return httpx.Response(
                    200, stream=Broken(frames(1, 2) + b": here\n\n" + frames(3, 3)[:cut], loudly=loudly)
                )
            if len(asked) == 2:
                return httpx.Response(503, json={"error": {"message": "starting"}})
            return httpx.Response(200, content=frames(int(request.headers["Last-Event-ID"]) + 1))

        assert list(map(repr, streamed(answer, wait=wait))) == list(map(repr, whole))
        again = ("GET", "/under/api/v1/images/a%2F1/events", "2")
        assert asked == [("POST", "/under/api/v1/images", None), again, again]


@pytest.mark.parametrize("wait", [True, False], ids=["sync", "async"])
def test_a_server_that_stays_away_is_an_error(wait: bool) -> None:
    calls = []

    def answer(request: httpx.Request) -> httpx.Response:
        calls.append(request.method)
        if len(calls) > 1:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, stream=Broken(frames(1, 2), loudly=True))

    with pytest.raises(UnavailableError, match="does not answer: refused"):
        streamed(answer, wait=wait)
    assert calls == ["POST", "GET", "GET"]

    # what was never heard of cannot be gone on with: it is not drawn twice
    calls.clear()
    with pytest.raises(UnavailableError, match="does not answer: the connection ended"):
        streamed(lambda request: calls.append(request.method) or httpx.Response(200, content=b": here\n"), wait=wait)
    assert calls == ["POST"]


def test_refusals_are_exceptions_with_the_servers_words() -> None:
    error = {"message": "steps=0 must be from 1 to 100", "type": "invalid_request_error", "param": "steps", "code": "x"}
    answers = {
        "/api/v1/images": httpx.Response(400, json={"error": error}),
        "/api/v1/model": httpx.Response(429, json={"error": {"message": "full"}}, headers={"Retry-After": "7"}),
        "/api/v1/status": httpx.Response(502, text="<html>a proxy's</html>"),
        "/api/v1/images/x": httpx.Response(404, json={"error": {"message": "no such id"}}),
        "/api/v1/images/y": httpx.Response(200, json={}),
        "/api/v1/images/z": httpx.Response(401, json={"error": {"message": "a key is needed"}}),
    }
    with Client(transport=httpx.MockTransport(lambda request: answers[request.url.path])) as client:
        for ask in (client.images, lambda *a, **k: list(client.stream(*a, **k))):
            with pytest.raises(ApiError, match="steps=0 must be from 1 to 100") as refused:
                ask("x", steps=0)
            assert (refused.value.status, refused.value.param, refused.value.code) == (400, "steps", "x")
        with pytest.raises(BusyError, match="full") as busy:
            client.model()
        assert busy.value.retry_after == 7
        with pytest.raises(UnavailableError, match="HTTP 502"):
            client.status()
        assert [client.cancel("x"), client.cancel("y")] == [False, True]
        with pytest.raises(ApiError, match="a key is needed"):
            client.cancel("z")

    ended = b'id: 1\nevent: error\ndata: {"id": "1", "error": {"message": "not done within 3 s", "code": "late"}}\n\n'
    with pytest.raises(ApiError, match="not done within 3 s") as late:
        streamed(lambda _: httpx.Response(200, content=ended), wait=True)
    assert (late.value.status, late.value.code) == (0, "late")


@pytest.mark.parametrize("wait", [True, False], ids=["sync", "async"])
def test_who_leaves_early_cancels(wait: bool) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.path))
        return httpx.Response(200, content=frames(1, 3)) if request.method == "POST" else httpx.Response(200, json={})

    transport = httpx.MockTransport(answer)
    if wait:
        with Client(transport=transport) as client:
            events = client.stream("red apple")
            assert isinstance(next(events), Queued)
            events.close()
    else:

        async def leave() -> None:
            async with AsyncClient(transport=transport) as client:
                events = client.stream("red apple")
                assert isinstance(await anext(events), Queued)
                await events.aclose()

        asyncio.run(leave())
    assert asked == [("POST", "/api/v1/images"), ("DELETE", "/api/v1/images/a/1")]


def test_some_images_may_fail() -> None:
    errors = [{"index": 1, "error": {"message": "the picture is not finite", "code": "non_finite"}}]
    answer = {"id": "1", "images": [{"index": 0, "seed": 7, "b64_json": encoded("red")}], "errors": errors}
    with (
        Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=answer))) as client,
        pytest.raises(IncompleteError, match="image 1: the picture is not finite") as incomplete,
    ):
        client.images("red apple", num_images=2)
    assert [picture.seed for picture in incomplete.value.pictures] == [7]
    assert incomplete.value.code == "non_finite"


def test_types_have_the_fields_of_the_servers_schema() -> None:
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    from madformer.serving.native import ImageRequest
    from madformer.serving.schema import ModelCard
    from madformer.serving.schema import Status as ServerStatus

    assert ModelInfo.__annotations__.keys() == ModelCard.model_fields.keys()
    assert Status.__annotations__.keys() == ServerStatus.model_fields.keys()
    assert module.ImageOptions.__annotations__.keys() | {"prompt"} == ImageRequest.model_fields.keys()
