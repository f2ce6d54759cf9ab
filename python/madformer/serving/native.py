"""The native API: everything that the model can do, and how it goes while it is done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from madformer.serving import errors
from madformer.serving.access import Client, service_of
from madformer.serving.drawing import FORMATS, Asked, decode_base64
from madformer.serving.errors import ServingError
from madformer.serving.fairness import PRIORITIES
from madformer.serving.generations import Generation
from madformer.serving.schema import ANSWERS, MAX_SEED, Drawn, ModelCard, State, Status
from madformer.serving.service import Service
from madformer.serving.streaming_response import EventStream, or_gone

router = APIRouter(prefix="/api/v1", tags=["native"], responses=ANSWERS)
Format = Literal["png", "webp", "jpeg"]
EXAMPLES: list[JsonValue] = [
    {"prompt": "red apple", "guidance_scale": 3, "steps": 25, "seed": 0},
    {"label": "Food & Drink", "num_images": 4, "output_format": "webp"},
    {"prompt": "blue heart", "seed": 1, "priority": 1, "deadline": 30, "scheduler": "ddim"},
]


class ImageRequest(BaseModel):
    """What to draw."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra={"examples": EXAMPLES}
    )

    prompt: Annotated[str | None, Field(description="for a model with text")] = None
    label: Annotated[int | str | None, Field(description="for a model with classes: a number or a name")] = None
    negative_prompt: Annotated[str | None, Field(description="what guidance leads away from")] = None
    num_images: Annotated[int, Field(ge=1, description="image i has seed + i")] = 1
    steps: Annotated[int | None, Field(ge=1, description="denoising steps of every block")] = None
    guidance_scale: Annotated[float | None, Field(ge=0, le=1000, description="up to 1 there is none")] = None
    guidance_interval: Annotated[
        list[float] | None, Field(min_length=2, max_length=2, description="lowest and highest timestep with guidance")
    ] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED, description="any, where none is given")] = None
    scheduler: Annotated[str | None, Field(max_length=64, description="in place of the model's own")] = None
    priority: Annotated[int, Field(ge=-PRIORITIES, le=PRIORITIES, description="lower goes first")] = 0
    deadline: Annotated[float | None, Field(gt=0, le=86_400, description="seconds until it is given up")] = None
    blocks: Annotated[
        list[int] | None, Field(min_length=1, max_length=65_536, description="places of blocks to draw anew, of image")
    ] = None
    image: Annotated[str | None, Field(description="base64 of a PNG, JPEG or WebP, to keep but for blocks")] = None
    diffusion_layers: Annotated[int | None, Field(ge=1, description="of an elastic model")] = None
    refresh_every: Annotated[int, Field(ge=1, description="1 alone, where images share their steps")] = 1
    output_format: Format | None = None

    def asked(self, *, output_format: str, streamed: bool, max_pixels: int) -> Asked:
        """Plain, with its picture decoded. Raises ``ServingError``."""
        values = self.model_dump(exclude={"image", "output_format"})
        image = None if self.image is None else decode_base64(self.image, max_pixels)
        previews = None if streamed else frozenset[int]()
        return Asked(**values, image=image, output_format=output_format, previews=previews)


PICTURES: dict[str, Any] = {media_type: {} for media_type in FORMATS.values()}
ANY_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"model": Drawn, "content": {**PICTURES, "text/event-stream": {}}, "description": "by the header Accept"}
}


@router.post("/images", responses=ANY_ANSWER)
async def create_images(body: ImageRequest, request: Request, client: Client) -> Response:
    """Draw images. `Accept` says how they come: as JSON, as one picture, or as server-sent events while they are drawn.

    Events: `queued`, `started`, `step`, `block` (the picture so far, whenever a block is done), `finished`, `done` or
    `error`.
    """
    service, accepted = service_of(request), accepted_type(request.headers.get("accept", "*/*"))
    streamed, picture = accepted == "text/event-stream", accepted.startswith("image/")
    if picture and body.num_images != 1:
        raise ServingError.refused(
            f"num_images={body.num_images} images are no one picture: ask for JSON", "num_images"
        )
    service.desk.check_room(body.num_images, client)
    by_accept = {media_type: name for name, media_type in FORMATS.items()}.get(accepted)
    asked = await service.in_thread(
        body.asked,
        output_format=by_accept or body.output_format or "png",
        streamed=streamed,
        max_pixels=service.settings.max_pixels,
    )
    generation = service.desk.submit(await service.read(asked), client, streamed=streamed)
    if streamed:
        return events_of(service, generation, 0)
    await finished(service, generation, request)
    if picture:
        (only,) = generation.pictures
        headers = {"X-Madformer-Seed": str(only.seed), "X-Madformer-Id": generation.id}
        return Response(only.file, media_type=FORMATS[generation.drawing.output_format], headers=headers)
    return JSONResponse(drawn(service, generation))


@router.get("/images/{id}", response_model=State)
async def image_state(id: str, request: Request, client: Client) -> Response:
    """How a request goes, or what came of it, for a while after its end."""
    service = service_of(request)
    generation = service.desk.find(id, client)
    state = {**drawn(service, generation), "status": generation.status}
    if generation.error is not None:
        state["error"] = generation.error.error
    return JSONResponse(state)


@router.get("/images/{id}/events", responses={200: {"content": {"text/event-stream": {}}}})
async def image_events(
    id: str, request: Request, client: Client, last_event_id: Annotated[str | None, Header(max_length=20)] = None
) -> Response:
    """Server-sent events of a request, all of them, or from behind `Last-Event-ID` on."""
    service = service_of(request)
    generation = service.desk.find(id, client)
    after = 0
    if last_event_id:
        if not (last_event_id.isascii() and last_event_id.isdigit()):
            raise ServingError.refused("Last-Event-ID must be a whole number", "Last-Event-ID")
        after = int(last_event_id)
    return events_of(service, generation, after)


@router.delete("/images/{id}", status_code=204)
async def cancel_images(id: str, request: Request, client: Client) -> Response:
    """Cancel a request; its slots are free at the next step."""
    service = service_of(request)
    service.desk.end(service.desk.find(id, client), errors.cancelled())
    return Response(status_code=204)


@router.get("/model", response_model=ModelCard)
async def model_card(request: Request, client: Client) -> Response:
    """What the model is, and what may be asked of it."""
    return JSONResponse(service_of(request).model())


@router.get("/status", response_model=Status)
async def status(request: Request, client: Client) -> Response:
    """How busy the server is."""
    return JSONResponse(service_of(request).status())


def drawn(service: Service, generation: Generation) -> dict[str, Any]:
    """What there is of a request by now."""
    pictures = generation.pictures
    failed = [{"index": p.index, "error": p.error.error} for p in pictures if p.error is not None]
    return {
        "id": generation.id,
        "created": generation.created,
        "model": service.name,
        "images": [generation.described(p) for p in pictures if p.file is not None],
        **({"errors": failed} if failed else {}),
    }


async def finished(service: Service, generation: Generation, request: Request) -> None:
    """Wait for it.

    Raises:
        ServingError: what kept it from being drawn, or the client is gone.
    """
    async with service.desk.watching(generation):
        if not await or_gone(generation.over, request.receive):
            raise errors.cancelled()
    generation.raise_if_failed()


def events_of(service: Service, generation: Generation, after: int) -> EventStream:
    async def frames() -> AsyncIterator[bytes]:
        async with service.desk.watching(generation):
            async for event in generation.log.follow(after):
                yield b": here\n\n" if event is None else event.frame

    return EventStream(frames(), service.settings.stall)


def accepted_type(header: str) -> str:
    """Of JSON, pictures and server-sent events the one that a client likes best, JSON where it does not mind.

    Raises:
        ServingError: 406, none of them.
    """
    ours = ["application/json", *FORMATS.values(), "text/event-stream"]
    best, weight = "", 0.0
    for part in header.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        found = next((own for own in ours if name in (own, f"{own.partition('/')[0]}/*", "*/*")), "")
        quality = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    quality = float(parameter[2:])
                except ValueError:
                    quality = 0.0
        if found and quality > weight:
            best, weight = found, quality
    if not best:
        raise ServingError(406, f"there are {', '.join(ours)}", "not_acceptable", param="Accept")
    return best
