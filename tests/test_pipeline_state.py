"""A pipeline's calls share nothing: side by side, within each other, copied, and whatever the process is set to."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig
from madformer.pipeline import MADFormerPipeline
from tests.helpers.engine_cases import FLAT, make_model
from tests.helpers.testing import relative_error

CONFIG = FLAT.replace(num_blocks=2, block_grid=(1, 2))
OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


def make_pipeline(scheduler: Callable[[], Any] = DDIMScheduler) -> MADFormerPipeline:
    pipeline = MADFormerPipeline(make_model(CONFIG), None, scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: MADFormerPipeline, seed: int = 0, **options: Any) -> Tensor:
    images = pipeline(seed=seed, **OPTIONS, **options).images
    assert isinstance(images, Tensor)
    return images


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def alone(pipeline: MADFormerPipeline) -> list[Tensor]:
    return [draw(pipeline, seed) for seed in range(2)]


def test_calls_side_by_side(pipeline: MADFormerPipeline, alone: list[Tensor]) -> None:
    with ThreadPoolExecutor(2) as threads:
        drawn = list(threads.map(lambda index: draw(pipeline, index % 2), range(4)))

    async def gather() -> list[Tensor]:
        return await asyncio.gather(*(asyncio.to_thread(draw, pipeline, index % 2) for index in range(4)))

    for images in (drawn, asyncio.run(gather())):
        assert all(torch.equal(image, alone[index % 2]) for index, image in enumerate(images))


def test_calls_within_each_other(pipeline: MADFormerPipeline, alone: list[Tensor]) -> None:
    """In a callback, in the body of a stream, and two streams in turns; one that is left gives its plan back."""

    def callback(*_: Any) -> dict[str, Any]:
        assert torch.equal(draw(pipeline, 1), alone[1])
        return {}

    assert torch.equal(draw(pipeline, 0, callback_on_step_end=callback), alone[0])
    shown = []
    for output in pipeline.stream(seed=0, **OPTIONS):
        assert torch.equal(draw(pipeline, 1), alone[1])
        shown.append(output.images)
    assert len(shown) == CONFIG.num_blocks
    assert torch.equal(shown[-1], alone[0])
    streams = [pipeline.stream(seed=seed, **OPTIONS) for seed in range(2)]
    for outputs in zip(*streams, strict=True):
        last = [output.images for output in outputs]
    assert all(map(torch.equal, last, alone))
    pipeline._plans.clear()
    left = pipeline.stream(seed=0, **OPTIONS)
    next(left)
    assert not pipeline._plans._idle
    left.close()  # type: ignore[attr-defined]
    assert len(pipeline._plans._idle) == 1
    assert torch.equal(draw(pipeline), alone[0])


def test_copies_and_pickles(pipeline: MADFormerPipeline, alone: list[Tensor]) -> None:
    """After a call; without what was packed for it."""
    buffer = io.BytesIO()
    torch.save(pipeline, buffer)
    assert buffer.tell() < 1.2 * sum(tensor.nbytes for tensor in pipeline.transformer.state_dict().values())
    buffer.seek(0)
    copies = copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert torch.equal(draw(other), alone[0])


def test_a_compiled_transformer(alone: list[Tensor]) -> None:
    pipeline = make_pipeline()
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    assert torch.equal(draw(pipeline), alone[0])


@contextlib.contextmanager
def _default(name: str) -> Iterator[None]:
    if name == "float64":
        torch.set_default_dtype(torch.float64)
    elif name == "meta":
        torch.set_default_device("meta")
    else:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)


AROUND: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
    "default dtype": lambda: _default("float64"),
    "default device": lambda: _default("meta"),
    "deterministic": lambda: _default("deterministic"),
}


@pytest.mark.parametrize("name", AROUND)
def test_whatever_the_process_is_set_to(name: str, pipeline: MADFormerPipeline, alone: list[Tensor]) -> None:
    with AROUND[name]():
        drawn = draw(pipeline)
    assert torch.equal(drawn, alone[0])


def test_a_model_in_float64(alone: list[Tensor]) -> None:
    pipeline = make_pipeline()
    pipeline.transformer.double()
    assert relative_error(draw(pipeline), alone[0]) < 1e-5


def test_a_scheduler_changed_by_attribute(pipeline: MADFormerPipeline, alone: list[Tensor]) -> None:
    """As a new pipeline draws with it, though its configuration says nothing of it."""
    pipeline, fresh = make_pipeline(), make_pipeline()
    draw(pipeline)
    for one in (pipeline, fresh):
        one.scheduler.alphas_cumprod = one.scheduler.alphas_cumprod**1.5
    changed = draw(pipeline)
    assert torch.equal(changed, draw(fresh))
    assert relative_error(changed, alone[0]) > 1e-3


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler],
)
def test_no_scheduler_hides_nan(scheduler: Callable[[], Any]) -> None:
    pipeline = make_pipeline(scheduler)
    bias = pipeline.transformer.upsampler.conv_out.bias.data
    sound = bias.clone()
    for value in (torch.nan, torch.inf):
        bias[0] = value
        with pytest.raises(FloatingPointError, match="image 0 of the batch is not finite from block 0, step 0 on"):
            draw(pipeline)
        bias.copy_(sound)
        assert draw(pipeline).isfinite().all()


def test_parts_that_go_together_no_longer() -> None:
    """Each was replaced or configured anew since it was assigned; and wrappers that hide the model."""
    pipeline = make_pipeline()
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="DDIMScheduler has prediction_type='v_prediction' and the model 'epsilon'"):
        draw(pipeline)
    pipeline = make_pipeline()
    pipeline.transformer = make_model(CONFIG.replace(prediction_type="sample"))
    with pytest.raises(ValueError, match="prediction_type='epsilon' and the model 'sample'"):
        draw(pipeline)
    for wrapped in (torch.nn.DataParallel(pipeline.transformer), None):
        with pytest.raises(ValueError, match=f"the transformer must be a MADFormer, got {type(wrapped).__name__}"):
            pipeline.transformer = wrapped
    text = make_model(CONFIG.replace(text=TextConfig(100, 8, 99)))
    with pytest.raises(ValueError, match=r"has 257 tokens, and the model text\.vocab_size=100"):
        MADFormerPipeline(text, None, DDIMScheduler(), ByteTokenizer())
    pipeline = MADFormerPipeline(text, None, DDIMScheduler())
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens"):
        pipeline.tokenizer = ByteTokenizer()
    pipeline = MADFormerPipeline(
        make_model(CONFIG.replace(text=TextConfig(257, 8, 256))), None, DDIMScheduler(), ByteTokenizer()
    )
    pipeline.transformer = text
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens"):
        draw(pipeline, prompt="a")
