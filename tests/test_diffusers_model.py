"""diffusers' own testers of models, run on ours. ``MADFORMER_DIFFUSERS`` names a clone of diffusers to take them from.

Nothing differs by design. Testers that ask for an accelerator run without one where they can.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import pytest
import torch

from madformer.config import MADFormerConfig, tiny
from madformer.model import MADFormer

CLONE = os.environ.get("MADFORMER_DIFFUSERS")
REFUSED = ("test requires accelerator", "test requires a hardware accelerator")


def _testers() -> Any:
    """``tests.models.testing_utils`` of the clone."""
    if CLONE is None:
        pytest.skip("MADFORMER_DIFFUSERS names no clone of diffusers", allow_module_level=True)
    # pytest may have put a package of the same name there, without a path
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name == "tests" or name.startswith("tests.")}
    sys.path.insert(0, CLONE)
    try:
        return importlib.import_module("tests.models.testing_utils")
    finally:
        sys.path.remove(CLONE)
        sys.modules.update(own)


testers = _testers()
DEVICE = sys.modules["tests.testing_utils"].torch_device


def _compiles(name: str) -> bool:
    return "compile" in name or "targets_more_layers" in name


def without_accelerator(cls: type) -> type:
    """Take off the marks that skip a test where there is no accelerator, but of tests that compile, which take long."""

    def kept(owner: Any, name: str = "") -> list[Any]:
        marks = owner.__dict__.get("pytestmark", [])
        return [mark for mark in marks if not mark.kwargs.get("reason", "").startswith(REFUSED) or _compiles(name)]

    for owner in cls.__mro__[:-1]:
        refused = [mark for mark in owner.__dict__.get("pytestmark", []) if mark not in kept(owner)]
        for name, test in vars(owner).items():
            if name.startswith("test_"):
                test.pytestmark = kept(test, name) + (refused if _compiles(name) else [])
        if refused:
            owner.pytestmark = kept(owner)  # type: ignore[attr-defined]
    return cls


class Configuration(testers.BaseModelTesterConfig):  # type: ignore[misc, name-defined]
    config: MADFormerConfig = tiny()
    model_class = MADFormer
    main_input_name = "clean_BMLC"
    output_shape = (4, 16, 4)

    def get_init_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    def get_dummy_inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        clean, noisy = torch.randn(2, 2, *self.output_shape, generator=generator).to(DEVICE)
        timestep = torch.randint(0, 1000, (2, self.output_shape[0]), generator=generator).to(DEVICE)
        return {"clean_BMLC": clean, "noisy_BMLC": noisy, "timestep_BM": timestep}


@without_accelerator
class TestModel(Configuration, testers.ModelTesterMixin):  # type: ignore[misc, name-defined]
    pass


class TestTraining(Configuration, testers.TrainingTesterMixin):  # type: ignore[misc, name-defined]
    def test_gradient_checkpointing_is_applied(self) -> None:
        expected = {"MADFormer", "DownBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "UpBlock2D"}
        super().test_gradient_checkpointing_is_applied(expected_set=expected)


class TestLora(Configuration, testers.LoraTesterMixin):  # type: ignore[misc, name-defined]
    pass


@without_accelerator
class TestLoraHotSwapping(Configuration, testers.LoraHotSwappingForModelTesterMixin):  # type: ignore[misc, name-defined]
    pass


class TestLayerwiseCasting(Configuration, testers.LayerwiseCastingTesterMixin):  # type: ignore[misc, name-defined]
    pass


class TestMemory(Configuration, testers.MemoryTesterMixin):  # type: ignore[misc, name-defined]
    pass


class TestCompile(Configuration, testers.TorchCompileTesterMixin):  # type: ignore[misc, name-defined]
    pass
