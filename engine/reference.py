"""The algorithm of sampling in twenty lines, with no cache: what the engine's tests compare it with.

Read it before the rest of this folder: :class:`~madformer.engine.sampler.Sampler` draws the same pictures, to
rounding, and differs in what it computes once and keeps. Here nothing is kept but the finished latents.

What comes from elsewhere: the noise of image ``i`` from a generator of its own, seeded with ``seed + i``
(``seeds.py``), whatever the batch; the update from a diffusers scheduler's own ``step``, any of
``engine/schedulers.py``, some of which ``engine/schedule.py`` writes as six numbers a step for the fused kernel.
Guidance is a second, unconditional pass.

Shape legend: B images, M blocks in the order in which they are made, L latents of a block, C channels, P tokens of a
text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.engine.schedulers import initial_deviation, model_input
from madformer.model import MADFormerOutput

__all__ = ["sample_uncached"]


@torch.no_grad()
def sample_uncached(
    model: Callable[..., MADFormerOutput],
    scheduler: Any,
    num_inference_steps: int,
    noise_BMLC: Tensor,
    prompt: Prompt | None = None,
    guidance: Callable[[float], float] | None = None,
    **keywords: Any,
) -> Tensor:
    """Draws images block by block, with one whole training pass over all blocks for every step of every block.

    The pass takes the blocks that are finished as clean, and for every block a noisy version with a timestep. The mask
    of training sees to it that a block's prediction depends on its predecessors and itself alone, so what stands in
    later blocks does not matter (zeros, here). Without a clean stream (``context="condition"`` or ``"noise"``) what a
    finished block's last step saw is what later blocks attend to, so it is left in place, with its timestep.

    It takes ``M * num_inference_steps`` passes over ``M`` blocks, twice as many under guidance; the engine takes the
    same number of passes over one block, through the diffusion layers alone. It is for tests and readers.

    Args:
        model: a :class:`~madformer.model.MADFormer` in eval mode, or what is called as one:
            ``model(clean_BMLC, noisy_BMLC, timestep_BM, text_BP, label_B)``. For blocks in another order give
            ``functools.partial(model, order_BM=...)``, and noise in that order.
        scheduler: any diffusers scheduler; its state is changed.
        num_inference_steps: denoising steps for each block.
        noise_BMLC: standard normal, in the model's dtype and on its device.
        prompt: what a model with text or classes asks for.
        guidance: the scale of classifier-free guidance (arXiv:2207.12598) at a timestep, up to 1000; None for none.
        keywords: for the scheduler's ``step``, such as ``generator``.

    Returns:
        Latents ``(B, M, L, C)``.
    """
    prompt = prompt or Prompt()
    dropped_B = None if prompt.label is None else torch.full_like(prompt.label, -1)
    clean_BMLC, noisy_BMLC = torch.zeros_like(noise_BMLC), torch.zeros_like(noise_BMLC)
    scheduler.set_timesteps(num_inference_steps)
    timestep_BM = torch.full(noise_BMLC.shape[:2], scheduler.timesteps[-1].item(), device=noise_BMLC.device)
    for block in range(noise_BMLC.shape[1]):
        scheduler.set_timesteps(num_inference_steps)  # multistep schedulers begin anew with every block
        latents_BLC = noise_BMLC[:, block] * initial_deviation(scheduler)
        for t in scheduler.timesteps:
            noisy_BMLC[:, block], timestep_BM[:, block] = model_input(scheduler, latents_BLC, t), t
            prediction_BLC = model(clean_BMLC, noisy_BMLC, timestep_BM, prompt.text, prompt.label).prediction[:, block]
            if guidance is not None:
                other = model(clean_BMLC, noisy_BMLC, timestep_BM, prompt.negative_text, dropped_B)
                unconditional_BLC = other.prediction[:, block]
                prediction_BLC = unconditional_BLC + guidance(float(t)) * (prediction_BLC - unconditional_BLC)
            latents_BLC = scheduler.step(prediction_BLC, t, latents_BLC, **keywords).prev_sample
        clean_BMLC[:, block] = latents_BLC
    return clean_BMLC
