"""Names, shapes and their order: an optimiser's state goes by the number of a parameter, not by its name."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from madformer.compat import acdit, export, madformer_ffhq, madformer_imagenet
from tests.helpers.testing import GOLDEN

SWITCHES = ("clear_clean", "clear_cond", "denoising_mlp")
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "ffhq": madformer_ffhq.MADFormer,
    "imagenet": madformer_imagenet.MADFormer,
    "acdit": acdit.ACDiT,
}
CLONES = {"ffhq": "MADFORMER_RELEASED", "imagenet": "MADFORMER_RELEASED_IMAGENET"}


def variants() -> Iterator[Any]:
    for family in FAMILIES:
        for variant in json.loads((GOLDEN / family / "order.json").read_text()):
            yield pytest.param(family, variant, id=f"{family}-{variant['arguments'] or 'plain'}")


def arguments(family: str, variant: dict[str, Any]) -> dict[str, Any]:
    """Of the constructor."""
    geometry = json.loads((GOLDEN / family / "geometry.json").read_text()) | variant["arguments"]
    if family == "acdit":
        return geometry
    config = json.loads((GOLDEN / family / "model_config.json").read_text()) | variant["model_config"]
    return geometry | {"latent_size": 4, "model_config_path": config}


def order_of(model: nn.Module) -> dict[str, Any]:
    return {
        "buffers": [name for name, _ in model.named_buffers()],
        "state": [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()],
        "parameters": [(name, list(parameter.shape)) for name, parameter in model.named_parameters()],
    }


@pytest.mark.parametrize(("family", "variant"), list(variants()))
def test_order_is_the_released_one(family: str, variant: dict[str, Any]) -> None:
    """With every combination of the switches, of which no released name depends, and for the models exported."""
    state = list(variant["state"].items())
    expected = {
        "buffers": variant["buffers"],
        "state": state,
        "parameters": [(name, shape) for name, shape in state if not name.endswith("inv_freq")],
    }
    many = family != "acdit" and not variant["arguments"]
    for values in itertools.product((False, True), repeat=len(SWITCHES) * many):
        model = FAMILIES[family](**arguments(family, variant), **dict(zip(SWITCHES, values, strict=False)))
        assert order_of(model) == expected, values
        if family != "acdit" and not any(values):
            assert order_of(export.to_released(model.to_native())) == expected, values


@pytest.mark.parametrize(("family", "variant"), [case for case in variants() if "acdit" not in str(case.id)])
def test_order_is_that_of_the_clone(family: str, variant: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("einops")
    if CLONES[family] not in os.environ:
        pytest.skip(f"{CLONES[family]} does not name a clone")
    from benchmarks.released import load_released

    module = load_released(Path(os.environ[CLONES[family]]), "cpu")
    module.MADFormerConfig.rope_theta = 10_000.0
    ours = arguments(family, variant)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(ours["model_config_path"]))
    theirs = module.MADFormer(**ours | {"model_config_path": str(path)})
    assert order_of(FAMILIES[family](**ours)) == order_of(theirs)
