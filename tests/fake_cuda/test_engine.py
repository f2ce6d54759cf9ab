"""Every pass of the engine on a pretended GPU: nothing is read for the host, and nothing comes from there."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from madformer.config import ffhq1024
from madformer.engine.graphs import EagerLauncher
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.sampler import Sampler
from tests.helpers.engine_cases import CASES
from tests.helpers.fake_gpu import GPU, Watch, make_model

ALL = {"ffhq1024": ffhq1024(), **CASES}
PASSES = ("first_block", "denoise", "next_block")
FEW = ("ffhq1024", "both", "text and classes", "ACDiT", "one block, condition only")
# All kinds of models in the dtype that a GPU is for; the others where it is not only a cast.
BOTH_DTYPES = [pytest.param(name, torch.bfloat16, id=name) for name in ALL]
BOTH_DTYPES += [pytest.param(name, torch.float32, id=f"{name}, fp32") for name in FEW]


def make_plan(name: str, dtype: torch.dtype) -> Plan:
    config = ALL[name]
    scheduler = DPMSolverMultistepScheduler(prediction_type=config.prediction_type)
    sampler = Sampler(make_model(config, dtype), scheduler, launcher=EagerLauncher())
    return sampler.plan(2, SamplingOptions(3, guidance=2.0 if config.can_be_guided else 1.0))


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize(("name", "dtype"), BOTH_DTYPES)
def test_passes(name: str, dtype: torch.dtype) -> None:
    passes = make_plan(name, dtype).passes
    for rows in (None, torch.zeros(2, dtype=torch.int64, device=GPU)):
        for each in PASSES[: 3 if ALL[name].num_blocks > 1 else 2]:
            with torch.inference_mode(), Watch() as watch:
                getattr(passes, each)(rows)
            assert not watch.found, each


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("name", ["both", "any order"])
def test_a_run_waits_for_nothing(name: str) -> None:
    """From its first launch to its last, where the noise is drawn on the device and nobody asks for a check."""
    config = ALL[name]
    plan = make_plan(name, torch.bfloat16)
    block = (2, config.latents_per_block, config.latent_channels)
    with Watch() as watch:
        images = plan.run(lambda place: torch.randn(block, device=GPU), check=False)
    assert images.device == GPU
    assert not watch.found
