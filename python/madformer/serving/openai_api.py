"""OpenAI's images API, so that its clients work as they are; what a model cannot do is a 400 that says so."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, NoReturn

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from madformer.serving.access import Client, service_of
from madformer.serving.drawing import FORMATS, Asked, decode_upload
from madformer.serving.errors import ServingError
from madformer.serving.events import Event
from madformer.serving.generations import Generation, Picture
from madformer.serving.native import finished
from madformer.serving.schema import ANSWERS
from madformer.serving.service import Service
from madformer.serving.streaming_response import EventStream

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ANSWERS)
MOST_PARTIAL = 3


class Options(BaseModel):
    """What both of its routes take. Fields that no model of ours has are refused, not passed over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    size: Annotated[str | None, Field(max_length=32)] = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "webp", "jpeg", "gif", "svg"] | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=MOST_PARTIAL)] = None
    background: Literal["transparent", "opaque", "auto"] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    # looked at by nobody here
    moderation: Literal["low", "auto"] | None = None
    user: str | None = None
    safety_identifier: str | None = None

    def check(self, service: Service) -> None:
        """Raises ``ServingError`` for what is known elsewhere, and has no place here."""
        width, height = service.reader.size
        if self.model not in (None, service.name):
            message = f"the model {self.model[:64]!r} does not exist: there is {service.name!r}"
            raise ServingError(404, message, "model_not_found", param="model")
        if self.size not in (None, "auto", f"{width}x{height}"):
            _refuse("size", f"size={self.size!r} is not possible: this model draws {width}x{height}")
        if self.output_format in ("gif", "svg"):
            _refuse("output_format", f"output_format={self.output_format!r} is not possible: there are png, webp, jpeg")
        if self.background == "transparent":
            _refuse("background", "background='transparent' is not possible: this model draws opaque pictures")
        if self.quality not in (None, "auto", "standard"):
            _refuse("quality", f"quality={self.quality!r} is not possible: steps of the native API decide it")
        if self.output_compression is not None and self.output_format not in ("webp", "jpeg"):
            _refuse("output_compression", "output_compression is for output_format webp or jpeg")
        if self.stream and self.response_format == "url":
            _refuse("response_format", "response_format='url' has no place in a stream")
        if self.partial_images and not self.stream:
            _refuse("partial_images", "partial_images is for stream=true")

    def asked(self, service: Service, **edit: Any) -> Asked:
        config = service.config
        # a model of classes is told a class by its name
        told = "label" if config.text is None and config.num_classes else "prompt"
        drawn = len(edit["blocks"]) if edit else config.num_blocks
        wanted = min(self.partial_images or 0, drawn - 1) if self.stream else 0
        return Asked(
            **{told: self.prompt or (None if config.text is None else "")},  # type: ignore[arg-type]
            num_images=self.n or 1,
            output_format=self.output_format or "png",
            quality=90 if self.output_compression is None else max(1, self.output_compression),
            previews=frozenset(evenly(wanted, drawn)),
            **edit,
        )


class GenerationRequest(Options):
    """``POST /v1/images/generations``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "red apple", "n": 2}]})


def evenly(count: int, blocks: int) -> list[int]:
    """Which blocks' pictures are shown, of all but the last, spread over them."""
    return [(index + 1) * blocks // (count + 1) - 1 for index in range(count)]


@router.post("/images/generations")
async def generate(body: GenerationRequest, request: Request, client: Client) -> Response:
    """Draw images of a prompt."""
    service = service_of(request)
    body.check(service)
    service.desk.check_room(body.n or 1, client)
    return await _answer(service, request, client, body, body.asked(service), "image_generation")


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "mask", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "mask": {"type": "string", "format": "binary"},
                        **{name: {"type": "string"} for name in Options.model_fields},
                    },
                }
            }
        },
    }
}


@router.post("/images/edits", openapi_extra=FORM)
async def edit(request: Request, client: Client) -> Response:
    """Draw blocks of a picture anew: those in which the mask is transparent anywhere."""
    service = service_of(request)
    service.desk.check_room(1, client)
    if "multipart/form-data" not in request.headers.get("content-type", ""):
        _refuse("image", "image and mask are sent as multipart/form-data")
    async with request.form(max_files=4, max_fields=32) as form:
        options, files = _options_of(form), await _files_of(form)
    options.check(service)
    most = service.settings.max_pixels
    image = await service.in_thread(decode_upload, files["image"], most)
    mask = await service.in_thread(decode_upload, files["mask"], most, "mask", keep_alpha=True)
    asked = options.asked(service, image=image, blocks=service.reader.places_of(mask))
    return await _answer(service, request, client, options, asked, "image_edit")


def _options_of(form: FormData) -> Options:
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        # a form has texts alone; none that is no number is one
        if name in ("n", "partial_images", "output_compression"):
            values[name] = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
        elif name == "stream":
            values[name] = {"true": True, "false": False}.get(value.lower(), value)
        else:
            values[name] = value
    try:
        return Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))
        raise ServingError.refused(f"{param}: {first['msg']}", param, str(first["type"])) from error


async def _files_of(form: FormData) -> dict[str, bytes]:
    files: dict[str, list[bytes]] = {"image": [], "mask": []}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if (kind := name.removesuffix("[]")) not in files:
                _refuse(name[:64], f"a file {name[:64]!r} has no place: there are image and mask")
            files[kind].append(await value.read())
    if len(files["image"]) != 1:
        _refuse("image", f"image must be one picture, got {len(files['image'])}")
    if len(files["mask"]) != 1:
        _refuse("mask", "a mask is missing: its transparent areas say which blocks are drawn anew")
    return {name: only for name, (only,) in files.items()}


async def _answer(
    service: Service, request: Request, client: str, options: Options, asked: Asked, kind: str
) -> Response:
    drawing = await service.read(asked)
    generation = service.desk.submit(drawing, client, streamed=bool(options.stream))
    if options.stream:
        return EventStream(_frames(service, generation, kind), service.settings.stall)
    await finished(service, generation, request)
    if failed := [picture.error for picture in generation.pictures if picture.error is not None]:
        raise failed[0]
    base = str(request.base_url)
    as_urls = options.response_format == "url"

    def data(picture: Picture) -> dict[str, str]:
        if not as_urls:
            return {"b64_json": picture.b64_json}
        assert picture.file is not None
        return {"url": f"{base}v1/files/images/{service.publish_file(picture.file, drawing.output_format)}"}

    answer = {
        "created": generation.created,
        "data": [data(picture) for picture in generation.pictures],
        **_common(generation),
        "usage": _usage(service, generation, drawing.count),
    }
    return JSONResponse({**answer, "background": "opaque"})


def _common(generation: Generation) -> dict[str, Any]:
    width, height = generation.size
    return {"size": f"{width}x{height}", "output_format": generation.drawing.output_format}


def _usage(service: Service, generation: Generation, count: int) -> dict[str, Any]:
    text, tokenizer = generation.drawing.prompts.text, service.pipeline.tokenizer
    read = 0 if text is None else int((text[0] != tokenizer.pad_token_id).sum())
    made = count * len(generation.drawing.drawn) * service.config.block_size
    details = {"text_tokens": read, "image_tokens": 0}
    return {
        "input_tokens": read, "input_tokens_details": details, "output_tokens": made, "total_tokens": read + made,
    }  # fmt: skip


async def _frames(service: Service, generation: Generation, kind: str) -> AsyncIterator[bytes]:
    """Events as OpenAI's clients know them."""
    partial: dict[int, int] = {}
    last = len(generation.drawing.drawn) - 1
    async with service.desk.watching(generation):
        async for event in generation.log.follow():
            if event is None:
                yield b": here\n\n"
            elif event.kind == "block" and event.values["order"] < last:
                number = partial.get(event.values["index"], 0)
                partial[event.values["index"]] = number + 1
                yield _frame(f"{kind}.partial_image", generation, event, partial_image_index=number)
            elif event.kind == "finished":
                yield _frame(f"{kind}.completed", generation, event, usage=_usage(service, generation, 1))
            elif event.kind == "error":
                yield b"event: error\ndata: " + json.dumps({"error": event.values["error"]}).encode() + b"\n\n"


def _frame(kind: str, generation: Generation, event: Event, **values: Any) -> bytes:
    data = {
        "type": kind,
        "b64_json": event.values["b64_json"],
        "created_at": generation.created,
        **_common(generation),
        "quality": "auto",
        "background": "opaque",
        **values,
    }
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


@router.get("/models")
async def models(request: Request, client: Client) -> Response:
    """The one model that there is."""
    return JSONResponse({"object": "list", "data": [_model(service_of(request))]})


@router.get("/models/{id}")
async def model(id: str, request: Request, client: Client) -> Response:
    """The same by its name."""
    service = service_of(request)
    if id != service.name:
        raise ServingError(404, f"the model {id[:64]!r} does not exist", "model_not_found", param="model")
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "madformer"}


@router.get(
    "/files/images/{token}",
    response_class=Response,
    responses={200: {"content": {media_type: {} for media_type in FORMATS.values()}}},
)
async def file(token: str, request: Request) -> Response:
    """A picture by its address, which whoever has it may use until it expires."""
    found = service_of(request).file(token)
    seconds = max(0, int(found.expires - time.monotonic()))
    return Response(found.data, media_type=found.media_type, headers={"Cache-Control": f"private, max-age={seconds}"})


def _refuse(param: str, message: str) -> NoReturn:
    raise ServingError.refused(message, param)
