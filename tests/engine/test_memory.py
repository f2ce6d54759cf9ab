"""A batch that does not fit is named with the largest that does, and leaves the device as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import DDIMScheduler

from madformer.config import tiny
from madformer.engine import memory
from madformer.engine.batching import InFlightBatcher
from madformer.engine.memory import OutOfMemoryError
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler, bytes_per_image
from tests.helpers.engine_cases import STEPS, draw_noise, make_model
from tests.helpers.testing import DEVICE

CPU = torch.device("cpu")


def test_the_system_is_asked_before_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(make_model(tiny()), DDIMScheduler())
    per_image = bytes_per_image(sampler.source, STEPS)
    monkeypatch.setattr(memory, "available", lambda device: 3 * per_image + per_image // 2)
    with pytest.raises(OutOfMemoryError, match=r"^batch=4 does not fit in the memory of cpu: the largest .* is 3$"):
        sampler.plan(4, SamplingOptions(STEPS))
    with pytest.raises(OutOfMemoryError, match="batch=9 does not fit"):
        InFlightBatcher(sampler, 9, max_steps=STEPS)
    sampler.plan(3, SamplingOptions(STEPS)).run(draw_noise(tiny(), batch=3))
    monkeypatch.setattr(memory, "available", lambda device: per_image - 1)
    with pytest.raises(OutOfMemoryError, match="not even a batch of 1 fits"):
        sampler.plan(1, SamplingOptions(STEPS))


def test_bytes_are_what_a_plan_allocates() -> None:
    sampler = Sampler(make_model(tiny()), DDIMScheduler())
    plan = sampler.plan(5, SamplingOptions(STEPS))
    assert plan.cache.nbytes + plan.slots.nbytes == 5 * bytes_per_image(sampler.source, STEPS)


@pytest.mark.parametrize("fits", [0, 1, 5, 6])
def test_search_on_a_device_that_has_to_be_tried(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory is known only by running; what a failed trial holds is given back before the next."""
    held: list[int] = []
    tried: list[int] = []

    def make(batch: int) -> int:
        tried.append(batch)
        assert not held, "the last trial's memory was not given back"
        held.append(batch)
        if batch > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    monkeypatch.setattr(memory, "available", lambda device: 1 << 40)
    monkeypatch.setattr(memory, "release", lambda device: held.clear())
    expected = f"the largest batch that fits is {fits}$" if fits else "not even a batch of 1 fits"
    with pytest.raises(OutOfMemoryError, match=expected):
        memory.largest_fit(make, 7, 1, torch.device("cuda"))
    assert len(tried) <= 4


def test_other_errors_pass() -> None:
    def make(batch: int) -> int:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        memory.largest_fit(make, 1, 1, CPU)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A gibibyte more than this process has: other tests run on the same GPU."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + (1 << 30)) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_gpu_stays_usable(little_memory: None) -> None:
    sampler = Sampler(make_model(tiny()).to(DEVICE), DDIMScheduler())
    with pytest.raises(OutOfMemoryError, match=r"the largest batch that fits is [1-9]"):
        sampler.plan(1 << 24, SamplingOptions(STEPS))
    noise = draw_noise(tiny())
    assert sampler.plan(2, SamplingOptions(STEPS)).run(noise).isfinite().all()
