"""Two training steps of each model on a pretended GPU, a program of ``test_training.py``: a line of JSON each."""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from diffusers import DDPMScheduler
from torch._subclasses.fake_tensor import unset_fake_temporarily

from madformer.config import MADFormerConfig, ffhq1024, tiny
from madformer.training.losses import Batch, Losses, LossWeights, training_losses
from madformer.training.optimization import MovingAverages, StepGuard
from tests.helpers.engine_cases import CASES
from tests.helpers.fake_gpu import GPU, Watch, make_model, pretended_gpu

BATCH = 2
DEVICES = 64
"""More than the engine asks about: it looks at one beyond the last, too."""
MODELS = {"ffhq1024": ffhq1024(), "planted": tiny(), **CASES}


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Autograd's C++ sees devices, as ``stub.c`` has them: only while it runs, and not where it would ask them."""
    count = ctypes.CDLL(None).set_device_count
    select = torch._C._select_conv_backend

    def on_no_device(*args: object, **options: object) -> object:
        count(0)
        try:
            return select(*args, **options)
        finally:
            count(DEVICES)

    count(DEVICES)
    try:
        patched = mock.patch.object(torch._C, "_select_conv_backend", on_no_device)
        with patched, torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        count(0)


def read_loss(losses: Losses) -> None:
    """What a loop that logs every step does, and what one does that draws on the CPU."""
    torch.zeros(BATCH).to(GPU)
    with contextlib.suppress(Exception):  # a fake tensor has no value
        losses.total.item()


def train(config: MADFormerConfig, after_forward: Callable[[Losses], object] = lambda _: None) -> dict[str, object]:
    model = make_model(config, torch.float32, trained=True)
    shape = (BATCH, config.num_blocks, config.latents_per_block, config.latent_channels)
    clean, noise = torch.randn(shape, device=GPU), torch.randn(shape, device=GPU)
    integers = {"dtype": torch.int64, "device": GPU}
    timestep = torch.zeros(shape[:2], **integers)
    text = None if config.text is None else torch.zeros(BATCH, config.text.length, **integers)
    labels = torch.zeros(BATCH, **integers) if config.num_classes else None
    order = torch.arange(config.num_blocks, device=GPU).expand(BATCH, -1) if config.block_order == "random" else None
    with unset_fake_temporarily():
        scheduler = DDPMScheduler(prediction_type=config.prediction_type)
    weights = LossWeights(
        hidden=0.1 if config.has_condition else 0.0,
        clean=0.1 if config.has_clean_stream else 0.0,
        text=0.0 if config.text is None else 0.1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    guard, averages = StepGuard(optimizer, GPU, 100.0), MovingAverages(model, (0.999,))
    batch = Batch(clean, noise, timestep, labels, text_BP=text, order_BM=order)
    for step in range(2):  # the second is like all that follow
        with Watch() as watch:
            with torch.autocast("cuda", torch.bfloat16):
                losses = training_losses(model, batch, scheduler, weights)
            after_forward(losses)
            with one_device():
                losses.total.backward()
            wrong = [
                name
                for name, weight in model.named_parameters()
                if weight.grad is not None
                and (weight.grad.shape, weight.grad.dtype, weight.grad.device) != (weight.shape, weight.dtype, GPU)
            ]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            guard.step(norm)
            optimizer.zero_grad(set_to_none=True)
            averages.update(step)
    return {"found": dict(watch.found), "wrong gradients": wrong, "ops": sum(watch.ops.values())}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with pretended_gpu():
            result = train(MODELS[name], *([read_loss] if name == "planted" else []))
        print(json.dumps({"model": name, **result}), flush=True)
