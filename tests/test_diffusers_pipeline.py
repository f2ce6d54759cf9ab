"""diffusers' own tester of pipelines, run on ours. ``MADFORMER_DIFFUSERS`` names a clone of diffusers to take it from.

What differs by design is in ``BY_DESIGN`` with its reason, and in ``docs/diffusers.md``.
"""

from __future__ import annotations

import importlib
import os
import sys
import unittest
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler

from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig, tiny
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.testing import perturb, small_vae

CLONE = os.environ.get("MADFORMER_DIFFUSERS")
UNUSED = ("transformers.test_models_transformer_flux", "unets.test_models_unet_2d_condition")
BY_DESIGN = {"sequential offloading": "sampling reads weights outside of their modules' calls"}


def _testers() -> Any:
    """``tests.pipelines.test_pipelines_common`` of the clone."""
    if CLONE is None:
        pytest.skip("MADFORMER_DIFFUSERS names no clone of diffusers", allow_module_level=True)
    # pytest has given our own folder that name
    ours = sys.modules.pop("tests", None)
    sys.path.insert(0, CLONE)
    try:
        # its marks are none that ours know; testers of single models, which need more packages, are not asked for
        stubs = {f"tests.models.{name}": mock.MagicMock() for name in UNUSED}
        with mock.patch.object(pytest.mark, "_config", None), mock.patch.dict(sys.modules, stubs):
            return importlib.import_module("tests.pipelines.test_pipelines_common")
    finally:
        sys.path.remove(CLONE)
        if ours is not None:
            sys.modules["tests"] = ours


common = _testers()


def components(*, text: bool) -> dict[str, Any]:
    """Of a model of texts and classes, or of classes alone, on 16 x 16 pixels."""
    config = tiny().replace(time_conditioning="unet+adaln", num_classes=3)
    if text:
        config = config.replace(text=TextConfig(vocab_size=257, length=32, pad_token_id=256))
    torch.manual_seed(0)
    return {
        "transformer": perturb(MADFormer(config), scale=0.01),
        "vae": small_vae(),
        "scheduler": DDIMScheduler(clip_sample=False),
        "tokenizer": ByteTokenizer() if text else None,
    }


class TestMADFormerPipeline(common.PipelineTesterMixin, common.PipelineLatentTesterMixin, unittest.TestCase):
    pipeline_class = MADFormerPipeline
    params = frozenset(
        ["prompt", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"]
    )
    batch_params = frozenset(["prompt", "negative_prompt"])
    image_params: frozenset[str] = frozenset()
    image_latents_params = frozenset(["latents"])
    test_layerwise_casting = True
    test_group_offloading = True

    def get_dummy_components(self) -> dict[str, Any]:
        return components(text=True)

    def get_dummy_inputs(self, device: Any, seed: int = 0) -> dict[str, Any]:
        return {
            "prompt": "A painting of a squirrel eating a burger",
            "generator": torch.Generator().manual_seed(seed),
            "num_inference_steps": 2,
            "guidance_scale": 6.0,
            "output_type": "np",
        }

    def test_save_load_optional_components(self) -> None:
        """Of a model that needs neither: without a tokenizer there is no prompt, without an autoencoder no picture."""
        labelled = {"labels": [1], "num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "latent"}
        with (
            mock.patch.object(self, "get_dummy_components", side_effect=lambda: components(text=False)),
            mock.patch.object(self, "get_dummy_inputs", return_value=labelled),
        ):
            super().test_save_load_optional_components()

    def test_sequential_cpu_offload_forward_pass(self, **_: Any) -> None:
        self._refused(BY_DESIGN["sequential offloading"])

    def test_sequential_offload_forward_pass_twice(self, **_: Any) -> None:
        self._refused(BY_DESIGN["sequential offloading"])

    def _refused(self, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            MADFormerPipeline(**components(text=True)).enable_sequential_cpu_offload(device="cpu")
