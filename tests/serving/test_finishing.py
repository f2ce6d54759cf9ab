"""Pictures made of latents: between the steps on a processor, in the order in which they were put."""

from __future__ import annotations

import io
import threading
import time
import unittest.mock
from collections.abc import Iterator
from typing import Any

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
        assert torch.equal(drawn, to_uint8(pixels)[0].cpu().flatten())


def test_previews_are_decoded_together_and_stay_in_order(pipeline: MADFormerPipeline) -> None:
    finisher, delivered, sizes = Finisher(pipeline.vae, pipeline.transformer.config), Delivered(), []
    own = pipeline.vae.decode

    def counted(latents_BCHW: Tensor, **options: Any) -> Any:
        sizes.append(len(latents_BCHW))
        return own(latents_BCHW, **options)

    with unittest.mock.patch.object(pipeline.vae, "decode", counted):
        for number, preview in enumerate((True, False, True, False, True)):
            tensor = latents(pipeline, number)
            finisher.put(
                Work(lambda t=tensor: t, "png", 90, lambda m, n=number: delivered.append((n, m)), preview=preview)
            )
        finisher.stop()
    assert sorted(sizes) == [1, 1, 3]
    assert [number for number, _ in delivered] == [0, 1, 2, 3, 4]
    for number, made in delivered:
        assert isinstance(made, bytes)
        with torch.inference_mode():
            alone = to_uint8(decode(pipeline.vae, from_blocks(latents(pipeline, number)[None], finisher.config)))
        drawn = torch.frombuffer(bytearray(Image.open(io.BytesIO(made)).tobytes()), dtype=torch.uint8)
        difference = (drawn.float() - alone[0].flatten().float()).abs().max()
        assert difference <= (1 if number % 2 == 0 else 0)


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

    finisher.put(Work(fail, "png", 90, lambda made: delivered.append((3, made)), preview=True))
    finisher.finish_waiting()
    put(finisher, delivered, 4, latents(pipeline, 4))
    finisher.finish_waiting()
    wait_for(delivered, 5)
    assert [number for number, _ in delivered[3:]] == [3, 4]
    assert isinstance(delivered[3][1], KeyError)
    assert isinstance(delivered[4][1], bytes)


@pytest.mark.parametrize("beside", [False, True])
def test_a_preview_that_fails_harms_no_finished_picture(pipeline: MADFormerPipeline, beside: bool) -> None:
    """On a processor, where finished ones are decoded apart; a thread beside the steps has them together."""

    def fail() -> Tensor:
        raise KeyError("no such block")

    finisher, delivered = Finisher(pipeline.vae, pipeline.transformer.config), Delivered()
    finisher.beside = beside
    for number, compose in enumerate((fail, lambda: latents(pipeline, 1))):
        finisher.put(Work(compose, "png", 90, lambda made, n=number: delivered.append((n, made)), preview=number == 0))
    finisher.start()
    finisher.stop()
    assert [number for number, _ in delivered] == [0, 1]
    assert [type(made) for _, made in delivered] == [KeyError, KeyError if beside else bytes]


def test_the_end_leaves_nothing(pipeline: MADFormerPipeline) -> None:
    before = set(threading.enumerate())
    finisher, delivered = Finisher(pipeline.vae, pipeline.transformer.config), Delivered()
    finisher.start()
    put(finisher, delivered, 0, latents(pipeline, 0))
    finisher.stop()
    assert len(delivered) == 1
    assert isinstance(delivered[0][1], bytes)
    assert set(threading.enumerate()) <= before
