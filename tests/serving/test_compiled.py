"""A server whose denoising steps are compiled: its pictures are the pipeline's, and it is ready when they are."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from madformer import MADFormerPipeline
from madformer.cli.serve import Serve
from madformer.serving import ServerSettings
from tests.helpers.interpreted import interpret
from tests.helpers.serving_cases import drawn, pixels, same, serving

SETTINGS = ServerSettings(slots=3, max_waiting=8, max_images=4, compile=True)


def test_pictures(pipeline: MADFormerPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of requests with guidance and without, which come at a time."""
    interpreted = interpret(monkeypatch, tmp_path)
    with serving(pipeline, SETTINGS) as server:
        # an image of each kind was drawn to warm up, in two steps a block
        kinds, blocks = 2, pipeline.transformer.config.num_blocks
        assert interpreted.calls >= kinds * 2 * blocks
        before = interpreted.calls
        with ThreadPoolExecutor(2) as threads:
            asked = [{"prompt": "a cat", "seed": 5, "num_images": 2, "guidance_scale": scale} for scale in (1.0, 3.0)]
            answers = list(threads.map(server.post, asked))
        for request, answer in zip(asked, answers, strict=True):
            assert answer.status_code == 200, answer.text
            images = [pixels(base64.b64decode(image["b64_json"])) for image in answer.json()["images"]]
            assert all(map(same, images, drawn(pipeline, **request)))
        assert interpreted.calls > before


def test_settings() -> None:
    assert Serve(model="MODEL", compile=True).settings.compile is True
    assert Serve(model="MODEL").settings.compile is False
    with pytest.raises(ValueError, match="compile=1 must be True or False"):
        ServerSettings(compile=1)  # type: ignore[arg-type]
