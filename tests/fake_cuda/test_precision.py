"""The modes of precision, and what is compiled, on a pretended GPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from madformer.config import ffhq1024, tiny
from madformer.engine import precision
from madformer.engine.graphs import EagerLauncher
from madformer.engine.options import SamplingOptions
from madformer.engine.precision import apply, quantize_rows, unquantized
from madformer.engine.sampler import Sampler
from tests.helpers.fake_gpu import GPU, Watch, make_model

TRACED = {"fullgraph": True, "backend": "aot_eager"}  # Inductor's code would ask the GPU


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["default", "fp8"])
def test_passes(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # compiled it is for real tensors: guards of PyTorch 2.11 take no fake one for the last one's like
    monkeypatch.setattr(precision, "_quantize_rows_fused", lambda: quantize_rows)
    model = apply(make_model(ffhq1024(), torch.float32), name)
    assert unquantized(model) == [] or name != "fp8"
    assert model.downsampler.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    plan = Sampler(model, DPMSolverMultistepScheduler(), launcher=EagerLauncher()).plan(batch, SamplingOptions(3))
    for each in (plan.passes.first_block, plan.passes.denoise, plan.passes.next_block):
        with torch.inference_mode(), Watch() as watch:
            each(None)
        assert not watch.found
        assert ("aten._scaled_mm.default" in watch.ops) == (name == "fp8")
        # the MLP's last product adds the residual
        assert ("aten.addmm_.default" in watch.ops) == (name == "default")


@pytest.mark.usefixtures("mode")
def test_compiled_parts_have_no_break() -> None:
    """What an option compiles: the halves of the U-Net, and a training step's layers under autocast."""
    config = tiny()
    model = make_model(config, torch.bfloat16)
    with torch.inference_mode():
        x = torch.randn(2, config.latent_channels, *config.block_latents, device=GPU, dtype=torch.bfloat16)
        time = torch.randn(2, config.time_widths[0], device=GPU)
        halves = [torch.compile(half, dynamic=False, **TRACED) for half in (model.downsampler, model.upsampler)]
        hidden, skips = halves[0](x, time)
        assert halves[1](hidden, time, skips).device == GPU
    model = make_model(config, torch.float32)
    shape = (2, config.num_blocks, config.latents_per_block, config.latent_channels)
    noise, timestep = torch.randn(shape, device=GPU), torch.zeros(shape[:2], dtype=torch.int64, device=GPU)
    for layer in model.layers:
        layer.compile(**TRACED)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert model(noise, noise, timestep).prediction.shape == shape
