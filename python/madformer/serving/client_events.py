"""What a server says to its clients: pictures, events, errors, and the parser of its event stream."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ApiError",
    "Block",
    "BusyError",
    "Done",
    "Event",
    "Failed",
    "Finished",
    "IncompleteError",
    "ModelInfo",
    "Picture",
    "Queued",
    "Started",
    "Status",
    "Step",
    "UnavailableError",
]


class ApiError(Exception):
    """The server refused a request, or could not finish it.

    Attributes:
        status: of HTTP; 0 where the request had begun and its events said that it failed.
        type, code, param: as in the server's error object, None where it says none.
    """

    def __init__(self, message: str, status: int = 0, error: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.type, self.code, self.param = ((error or {}).get(name) for name in ("type", "code", "param"))


class BusyError(ApiError):
    """The server, or the key's share of it, is full (429).

    Attributes:
        retry_after: seconds after which it asks to try again, None where it does not say.
    """

    retry_after: float | None = None


class IncompleteError(ApiError):
    """Some images of a request could not be drawn; what it says is the first one's reason.

    Attributes:
        pictures: those that could.
    """

    def __init__(self, message: str, error: Mapping[str, Any], pictures: list[Picture]) -> None:
        super().__init__(message, 0, error)
        self.pictures = pictures


class UnavailableError(ApiError):
    """The server does not answer, is starting or about to stop.

    Attributes:
        retry_after: as that of :class:`BusyError`.
    """

    retry_after: float | None = None


@dataclass(frozen=True)
class Picture:
    """A picture as the server made it.

    Attributes:
        index: its number in the request. seed: draws it again, alone.
        data: the file's bytes. output_format: png, webp or jpeg.
    """

    index: int
    seed: int
    data: bytes = field(repr=False)
    output_format: str = "png"

    @property
    def image(self) -> Image:
        """Decoded, a new image each time."""
        return _decoded(self.data)

    def save(self, path: str | Path) -> None:
        """Write the file as it came, whatever the name's ending."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True)
class Queued:
    """The request waits: requests before it, and seconds until it is expected to be done where that is known."""

    id: str
    position: int
    estimated_seconds: float | None = None


@dataclass(frozen=True)
class Started:
    """Image ``index`` has a slot."""

    id: str
    index: int


@dataclass(frozen=True)
class Step:
    """A step of a block is done; ``fraction`` of the image's steps are."""

    id: str
    index: int
    block: int
    step: int
    num_steps: int
    fraction: float


@dataclass(frozen=True)
class Block:
    """A block is done.

    Attributes:
        block: its place, row by row. order: its place in the order in which blocks are drawn.
        box: left, top, width and height in pixels. data: the file of the whole picture so far.
    """

    id: str
    index: int
    block: int
    order: int
    num_blocks: int
    box: tuple[int, int, int, int]
    data: bytes = field(repr=False)
    output_format: str = "png"

    @property
    def image(self) -> Image:
        """The whole picture so far, decoded."""
        return _decoded(self.data)


@dataclass(frozen=True)
class Finished:
    """Image ``index`` is done."""

    id: str
    index: int
    picture: Picture


@dataclass(frozen=True)
class Failed:
    """Image ``index`` cannot be drawn; the others of its request go on."""

    id: str
    index: int
    error: ApiError


@dataclass(frozen=True)
class Done:
    """The request is done, ``seconds`` after it came."""

    id: str
    seconds: float


Event = Queued | Started | Step | Block | Finished | Failed | Done
"""What :meth:`madformer.serving.client.Client.stream` gives."""


class ModelInfo(TypedDict, total=False):
    """The model that is served, as ``GET /api/v1/model`` tells; later servers may say more."""

    name: str
    image_size: list[int]
    num_blocks: int
    block_grid: list[int]
    block_order: list[int]
    conditioning: list[Literal["text", "class", "none"]]
    num_classes: int
    class_names: list[str]
    default_steps: int
    max_steps: int
    default_guidance_scale: float
    max_images: int
    max_prompt: int
    schedulers: list[str]
    guidance: bool
    editing: bool
    elastic: list[int] | None
    diffusion_layers: int
    num_layers: int
    formats: list[str]


class Status(TypedDict, total=False):
    """How the server is, as ``GET /api/v1/status`` tells."""

    ready: bool
    draining: bool
    waiting: int
    running: int
    slots: int
    steps_per_second: float
    step_seconds: float
    batch_fill: float
    images_done: int
    seconds_per_image: float


def error_of(status: int, content: bytes, retry_after: str | None) -> ApiError:
    """The exception for an answer that is none, of the server or of a proxy before it."""
    try:
        said = json.loads(content)
        error = said.get("error") or {"message": said.get("detail")}
        message = str(error["message"] or f"HTTP {status}")
    except (ValueError, AttributeError, KeyError, TypeError):
        error, message = {}, f"HTTP {status}"
    kind = BusyError if status == 429 else UnavailableError if status in (502, 503) else ApiError
    found = kind(message, status, error)
    if isinstance(found, BusyError | UnavailableError) and retry_after and retry_after.isdigit():
        found.retry_after = float(retry_after)
    return found


def picture_of(data: Mapping[str, Any], output_format: str) -> Picture:
    """One of an answer's ``images``, or what ``finished`` says."""
    content = base64.b64decode(data["b64_json"])
    return Picture(data["index"], data["seed"], content, data.get("output_format", output_format))


def pictures_of(answer: Mapping[str, Any]) -> list[Picture]:
    """Those of an answer in JSON.

    Raises:
        IncompleteError: some could not be drawn.
    """
    pictures = [picture_of(image, "png") for image in answer["images"]]
    if errors := answer.get("errors"):
        first = errors[0]
        raise IncompleteError(f"image {first['index']}: {first['error']['message']}", first["error"], pictures)
    return pictures


def event_of(kind: str, data: Mapping[str, Any], output_format: str) -> Event | None:
    """A server-sent event, None for a kind that is not known here.

    Raises:
        ApiError: it says that the request failed.
    """
    if kind == "error":
        error = ApiError(str(data["error"]["message"]), 0, data["error"])
        if data.get("index") is None:
            raise error
        return Failed(data["id"], data["index"], error)
    if kind == "finished":
        return Finished(data["id"], data["index"], picture_of(data, output_format))
    if kind == "block":
        content, format_ = base64.b64decode(data["b64_json"]), data.get("output_format", output_format)
        box = data["box"]
        places = (data["block"], data["order"], data["num_blocks"])
        return Block(data["id"], data["index"], *places, (box[0], box[1], box[2], box[3]), content, format_)
    plain: dict[str, type[Queued | Started | Step | Done]]
    plain = {"queued": Queued, "started": Started, "step": Step, "done": Done}
    if (cls := plain.get(kind)) is None:
        return None
    return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


class EventParser:
    """Server-sent events, line by line (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.id: str | None = None
        self.kind, self.data = "", list[str]()

    def feed(self, line: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The event that a line ends, if it ends one, with its data read as JSON."""
        if not line:
            self.last_id = self.id  # not before: what a broken connection cut off has not come
            if self.data:
                yield self.kind, json.loads("\n".join(self.data))
            self.kind, self.data = "", []
            return
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self.kind = value
        elif name == "data":
            self.data.append(value)
        elif name == "id":
            self.id = value


def _decoded(data: bytes) -> Image:
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.load()
    return image
