"""A small pipeline, and a server of it that listens on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from fastapi import FastAPI
from PIL import Image

from madformer import ByteTokenizer, MADFormerConfig, MADFormerPipeline
from madformer.config import TextConfig
from madformer.engine import SamplingOptions
from madformer.serving import ServerSettings, create_app
from madformer.serving.running import Server
from madformer.serving.service import Service
from tests.helpers.engine_cases import FLAT, make_model
from tests.helpers.vae_cases import make_vae

TEXT = FLAT.replace(text=TextConfig(vocab_size=257, length=8, pad_token_id=256))
SETTINGS = ServerSettings(slots=3, max_waiting=4, max_images=4, reconnect=0.1)
DEFAULTS = SamplingOptions(2, guidance=2.0)


def make_pipeline(config: MADFormerConfig = TEXT, **options: Any) -> MADFormerPipeline:
    pipeline = MADFormerPipeline(
        make_model(config).eval(),
        make_vae("AutoencoderKL"),
        DPMSolverMultistepScheduler(prediction_type=config.prediction_type),
        ByteTokenizer() if config.text is not None else None,
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Running:
    """A server that listens, and a client of it.

    Attributes:
        service: what is behind it, of its own thread.
    """

    def __init__(self, app: FastAPI, url: str) -> None:
        self.app, self.url = app, url
        self.service: Service = app.state.service
        self.http = httpx.Client(base_url=url, timeout=60)

    def post(self, body: dict[str, Any], accept: str = "application/json", **options: Any) -> httpx.Response:
        return self.http.post("/api/v1/images", json=body, headers={"Accept": accept}, **options)

    def events(self, body: dict[str, Any]) -> list[tuple[int, str, dict[str, Any]]]:
        """All events of a request that is streamed."""
        return events_of(self.post(body, "text/event-stream").text)

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Nothing is drawn within it, until the event is set."""
        stepper, go = self.service.desk.stepper, threading.Event()
        step = stepper._step

        def wait(*arguments: Any) -> None:
            go.wait(30)
            step(*arguments)

        stepper._step = wait  # type: ignore[method-assign]
        try:
            yield go
        finally:
            go.set()
            stepper._step = step  # type: ignore[method-assign]

    def settle(self) -> None:
        """Until nothing is drawn."""
        wait_for(lambda: not self.service.desk.active and not self.service.desk.stepper.num_running)


def next_event(texts: Iterator[str]) -> tuple[int, str, dict[str, Any]]:
    """The first of a stream that has just begun."""
    return events_of(next(texts).partition("\n\n")[0])[0]


def events_of(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Id, kind and data of server-sent events."""
    found = []
    for frame in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(pipeline: MADFormerPipeline, settings: ServerSettings | None = None, **options: Any) -> Iterator[Running]:
    """A server in a thread, ready."""
    options.setdefault("defaults", DEFAULTS)
    app = create_app(
        pipeline, settings or ServerSettings(slots=3, max_waiting=4, max_images=4, reconnect=0.1), **options
    )
    server = Server(app, "127.0.0.1", 0)
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    running = Running(app, f"http://127.0.0.1:{socket.getsockname()[1]}")
    try:
        wait_for(lambda: server.started and running.service.desk.is_ready)
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


ROUNDING = 1
"""Of 255: products of other batch sizes round otherwise."""


def pixels(data: bytes) -> torch.Tensor:
    """``(H, W, 3)`` of a file."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).int()


def file_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def drawn(pipeline: MADFormerPipeline, **options: Any) -> list[torch.Tensor]:
    """What the pipeline draws, unless told otherwise with what a server has for defaults."""
    images = pipeline(**{**DEFAULTS.keywords(), **options}).images
    return [pixels(file_of(image)) for image in images]


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and int((first - second).abs().max()) <= ROUNDING
