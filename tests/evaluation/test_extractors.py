"""The extractors that are fetched, of small or of random weights: what they see, and what they make of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from madformer.evaluation import evaluate, extract, load_extractor, open_images
from tests.helpers.evaluation_cases import pictures, write_folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.CLIPVisionConfig(**sizes, projection_dim=10, image_size=24, patch_size=8)
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_clip_is_that_of_transformers(clip_folder: Path, tmp_path: Path) -> None:
    import transformers

    extractor = load_extractor("clip", clip_folder)
    assert (extractor.input_size, extractor.width, extractor.head) == (24, 10, None)
    assert extractor.resizer == "Pillow, filter 3, to {'shortest_edge': 24}, cropped to {'height': 24, 'width': 24}"
    folder = write_folder(tmp_path / "images", pictures(6, size=32))
    found = extract(open_images(folder), extractor).features_ND
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    values = processor(images=[Image.open(path) for path in sorted(folder.iterdir())], return_tensors="pt")
    with torch.inference_mode():
        expected = network(**values).image_embeds.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    scores = evaluate(open_images(folder), open_images(folder), extractor, metrics=["cmmd"]).scores
    assert scores["cmmd"].value == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="is takes an extractor with classes, and clip has none"):
        evaluate(open_images(folder), None, extractor, metrics=["is"])


def test_weights_and_preprocessing_are_in_the_hash(clip_folder: Path, tmp_path: Path) -> None:
    import transformers

    extractor = load_extractor("clip", clip_folder)
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)
    for name in ("weights", "mean"):
        if name == "weights":
            network.visual_projection.weight.data[0, 0] += 1e-3
        else:
            network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder)
            processor.image_mean = [0.5, 0.5, 0.5]
        for part in (network, processor):
            part.save_pretrained(tmp_path / name)
        assert load_extractor("clip", tmp_path / name).hash != extractor.hash
    assert load_extractor("clip", clip_folder).hash == extractor.hash


def test_dinov2_is_the_class_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessorPil(**size).save_pretrained(tmp_path)
    extractor = load_extractor("dinov2", tmp_path)
    prepared = extractor.prepare(Image.fromarray(pictures(1, size=40)[0]))[None]
    assert prepared.shape == (1, 3, 28, 28)
    network = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = network(prepared).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(extractor.features(prepared), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="holds no clip with its image processor") as caught:
        load_extractor("clip", write_folder(tmp_path / "bare", pictures(1)))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_inception_is_that_of_the_fid(tmp_path: Path) -> None:
    """Of random weights: the network as a whole, behind pytorch-fid's resize; nothing is left half imported."""
    from madformer.evaluation.extractors import _inception_class

    kind: Any = _inception_class()
    assert "torch_fidelity" not in sys.modules or hasattr(sys.modules["torch_fidelity"], "calculate_metrics")
    empty = kind.__new__(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        empty.__init__("inception", ["2048"], feature_extractor_weights_path="none")
    torch.save(empty.state_dict(), tmp_path / "weights.pth")
    extractor = load_extractor("inception", tmp_path / "weights.pth")
    assert (extractor.width, extractor.input_size) == (2048, 299)
    image = pictures(1, size=64)[0]
    prepared = extractor.prepare(Image.fromarray(image))[None]
    values = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(values, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(prepared, expected)
    found = extractor.features(prepared)
    # the class's own way, whose resize is another one: of a picture that need not be resized
    whole = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 299, 299), np.uint8))
    with torch.inference_mode():
        theirs = empty(whole)[0].numpy()
        ours = extractor.features((whole.float() - 128) / 128)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert found.shape == (1, 2048)
    assert extractor.logits(found).shape == (1, 1008)
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"wrong.pth does not fit inception: Error\(s\) in loading") as caught:
        load_extractor("inception", tmp_path / "wrong.pth")
    assert len(str(caught.value).splitlines()) == 1
