"""Pictures made of latents: between the steps on a processor, in the order in which they were put."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor

from madformer.model.blocks import from_blocks
from madformer.pipeline import MADFormerPipeline
from madformer.serving.finishing import MOST_AT_ONCE, Finisher, Work
from madformer.vae import decode, to_uint8

Delivered = list[tuple[int, bytes | Exception]]


@pytest.fixture
def finisher(pipeline: MADFormerPipeline) -> Iterator[Finisher]:
    made = Finisher(pipeline.vae, pipeline.transformer.config)
    made.start()
    yield made
    made.stop()


def latents(pipeline: MADFormerPipeline, seed: int) -> Tensor:
    config = pipeline.transformer.config
    shape = config.num_blocks, config.latents_per_block, config.latent_channels
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def put(finisher: Finisher, delivered: Delivered, number: int, latents_MLC: Tensor) -> None:
    finisher.put(Work(lambda: latents_MLC, "png", 90, lambda made: delivered.append((number, made))))


def wait_for(delivered: Delivered, count: int) -> None:
    end = time.monotonic() + 30
    while len(delivered) < count and time.monotonic() < end:
        time.sleep(0.01)
    assert len(delivered) == count


def test_decoded_when_asked_and_delivered_in_order(finisher: Finisher, pipeline: MADFormerPipeline) -> None:
    delivered: Delivered = []
    count = MOST_AT_ONCE + 3
    for number in range(count):
        put(finisher, delivered, number, latents(pipeline, number))
    time.sleep(0.1)
    assert not delivered
    finisher.finish_waiting()
    wait_for(delivered, count)
    assert [number for number, _ in delivered] == list(range(count))
    for number, made in (delivered[0], delivered[-1]):
        assert isinstance(made, bytes)
        with torch.inference_mode():
            pixels = decode(pipeline.vae, from_blocks(latents(pipeline, number)[None], pipeline.transformer.config))
        drawn = torch.frombuffer(bytearray(Image.open(io.BytesIO(made)).tobytes()), dtype=torch.uint8)
        # of a batch of its own: sums may round in another order
        assert (drawn.float() - to_uint8(pixels)[0].cpu().flatten().float()).abs().max() <= 1


def test_faults_are_those_of_their_pictures(finisher: Finisher, pipeline: MADFormerPipeline) -> None:
    delivered: Delivered = []
    for number, factor in enumerate((1.0, torch.nan, 1.0)):
        put(finisher, delivered, number, factor * latents(pipeline, number))
    finisher.finish_waiting()
    wait_for(delivered, 3)
    kinds = [type(made) for _, made in delivered]
    assert kinds == [bytes, FloatingPointError, bytes]

    def fail() -> Tensor:
        raise KeyError("no such block")

    finisher.put(Work(fail, "png", 90, lambda made: delivered.append((3, made))))
    finisher.finish_waiting()
    put(finisher, delivered, 4, latents(pipeline, 4))
    finisher.finish_waiting()
    wait_for(delivered, 5)
    assert [number for number, _ in delivered[3:]] == [3, 4]
    assert isinstance(delivered[3][1], KeyError)
    assert isinstance(delivered[4][1], bytes)


def test_the_end_leaves_nothing(pipeline: MADFormerPipeline) -> None:
    before = set(threading.enumerate())
    finisher, delivered = Finisher(pipeline.vae, pipeline.transformer.config), Delivered()
    finisher.start()
    put(finisher, delivered, 0, latents(pipeline, 0))
    finisher.stop()
    assert len(delivered) == 1
    assert isinstance(delivered[0][1], bytes)
    assert set(threading.enumerate()) <= before
