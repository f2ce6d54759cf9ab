"""The shapes of answers, for the OpenAPI schema and for typed clients."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

MAX_SEED = 2**63 - 1


class ErrorBody(BaseModel):
    """What went wrong; the form is OpenAI's."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class DrawnImage(BaseModel):
    """One finished image."""

    index: int
    seed: int
    width: int
    height: int
    b64_json: str
    output_format: str


class ImageError(BaseModel):
    index: int
    error: ErrorBody


class Drawn(BaseModel):
    """A request's images; ``errors`` where some of them failed."""

    id: str
    created: int
    model: str
    images: list[DrawnImage]
    errors: list[ImageError] = []


class State(Drawn):
    """The same on the way."""

    status: Literal["queued", "running", "done", "failed", "cancelled"]
    error: ErrorBody | None = None


class ModelCard(BaseModel):
    """What the model is, and what may be asked of it."""

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


class Status(BaseModel):
    """How busy the server is."""

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


_REASONS = {
    400: "what cannot be done, in one line",
    401: "a key is missing, or unknown",
    404: "there is no such thing, or no longer",
    406: "nothing of what the client accepts",
    413: "too large",
    429: "too many wait; Retry-After says when to try again",
    500: "the model or the server failed",
    503: "not ready, or shutting down",
    504: "not done within its deadline",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": reason} for status, reason in _REASONS.items()
}
