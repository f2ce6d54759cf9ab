"""What the benchmark of a processor's step counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.step import count_operators
from madformer.config import emoji64
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.kernels import dispatch
from madformer.model import MADFormer

MOST = 160
"""Operators that a denoising step of the demonstration model may call from Python: it called 275 once."""


@pytest.mark.skipif(not dispatch.VECTORS or torch.cuda.is_available(), reason="C++'s ops for processors are not chosen")
def test_a_step_of_the_demonstration_model_calls_few_operators() -> None:
    plan = Sampler(MADFormer(emoji64()).eval(), DDIMScheduler(), shares=1).plan(1, SamplingOptions(2, guidance=3.0))
    called = count_operators(plan.warmup())
    assert sum(called.values()) <= MOST, called
