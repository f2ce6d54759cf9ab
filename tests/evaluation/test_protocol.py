"""Protocols: stored with every number, chosen by name, and never mixed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from madformer.cli.evaluate import Evaluate, _preset
from madformer.cli.main import main
from madformer.evaluation import (
    EXTRACTORS,
    METRICS,
    PRESETS,
    Estimate,
    Protocol,
    Score,
    check_comparable,
    load_extractor,
    preset,
)
from tests.helpers.evaluation_cases import pictures, tiny_extractor, write_folder

PROTOCOL = Protocol(
    metric="fd", options="", extractor="tiny", extractor_hash="0", resizer="bicubic", normalization="none",
    num_images=50, image_size=(16, 16), image_format="RGB, 8 bits", images_hash="a", reference="theirs",
    reference_hash="b", num_reference=60, weights="w", seed=0, scheduler="DDIM", steps=25, guidance=1.0,
    guidance_interval=(0.0, 900.0), precision="exact",
)  # fmt: skip
ONE = Score(Estimate(1.0, 0.5, 1.5, "jackknife"), PROTOCOL)


def other(**changes: Any) -> Score:
    return replace(ONE, protocol=replace(PROTOCOL, **changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extractor_hash", "1"), ("resizer", "bilinear"), ("num_images", 51), ("image_size", (32, 32)),
        ("reference_hash", "c"), ("num_reference", 61), ("scheduler", "DPM"), ("steps", 24), ("guidance", None),
        ("guidance_interval", None), ("precision", "default"), ("options", "nearest_k=3"), ("prompts", "p"),
    ],
)  # fmt: skip
def test_numbers_of_different_protocols_do_not_stand_in_one_table(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"different protocols are not to be compared: {field} of fd is") as caught:
        check_comparable([ONE, other(seed=7), other(**{field: value})])
    assert repr(value) in str(caught.value)
    check_comparable([ONE, other(**{field: value})], varying=[field])


def test_what_is_measured_may_differ() -> None:
    check_comparable([ONE, other(weights="v", seed=9, images_hash="z", reference="by another name", preset="fid-50k")])
    # the same fields of another metric are another column
    check_comparable([ONE, other(metric="kid", options="subsets=100")])
    check_comparable([])
    with pytest.raises(ValueError, match=r"stepz \(the nearest known name is steps\)"):
        check_comparable([ONE], varying=["stepz"])


def test_scores_survive_json() -> None:
    bare = replace(ONE, estimate=Estimate.bare(2.0, "no interval"))
    for score in (ONE, bare, replace(ONE, estimate=replace(ONE.estimate, deviation=0.25))):
        again = Score.of(json.loads(json.dumps(score.to_dict(), allow_nan=False)))
        assert again.protocol == score.protocol
        assert repr(again.estimate) == repr(score.estimate)
    with pytest.raises(ValueError, match="no score: 'value' is missing"):
        Score.of({"metric": "fd"})
    with pytest.raises(ValueError, match="no protocol: missing"):
        Protocol.of({"metric": "fd"})


def test_presets_are_to_be_had() -> None:
    for name, one in PRESETS.items():
        assert preset(name) is one
        assert set(one.metrics) <= set(METRICS)
        assert one.extractor in EXTRACTORS
    with pytest.raises(ValueError, match=r"unknown protocol fid-50 \(the nearest known name is fid-50k\)"):
        preset("fid-50")


def test_a_preset_decides_what_is_not_given() -> None:
    plain = Evaluate.parse(["--model", "m", "--protocol", "paper-ffhq-8k", "--reference", "r"], "")
    assert (plain.num_images, plain.steps, plain.scheduler, plain.metrics) == (8000, 250, "ddim", "fd")
    assert (plain.extractor, _preset(plain)) == ("inception", "paper-ffhq-8k")
    changed = Evaluate.parse(["--model", "m", "--protocol", "emoji-3k", "--steps", "8"], "")
    assert (changed.steps, changed.guidance, changed.captions, changed.reference) == (8, 2.0, True, "emoji:64")
    assert _preset(changed) is None
    folder = Evaluate.parse(["--images", "a", "--protocol", "emoji-3k"], "")
    assert (folder.num_images, folder.captions, folder.steps, _preset(folder)) == (3000, False, 25, "emoji-3k")


def test_a_file_of_options_may_name_a_preset(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('model = "m"\nprotocol = "emoji-3k"\nnum_images = 100\n')
    found = Evaluate.parse(["--config", str(tmp_path / "run.toml"), "--steps", "9"], "")
    assert (found.num_images, found.steps, found.guidance) == (100, 9, 2.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights, device: tiny_extractor())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(write_folder(tmp_path / "images", pictures(50)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to evaluate: give --images, or --model"),
        (["--images", "{}", "--model", "m"], "--images and --model are ways to say what to evaluate: give one"),
        (["--model", "m", "--reference", "{}"], "--model draws --num-images: give it, or a --protocol"),
        (["--images", "{}"], "nothing to compare with: give --reference"),
        (["--images", "{}", "--captions", "--reference", "{}"], "--captions are of --reference, and for --model"),
        (["--images", "{}", "--reference", "{}", "--cache", "c", "--fresh"], "--cache keeps features and --fresh"),
        (["--images", "{}", "--reference", "{}", "--metrics", "fid"], "unknown metric fid (the nearest known name is"),
        (["--images", "{}", "--metrics", "kid"], "kid takes a reference"),
        (["--images", "{}", "--reference", "{}", "--metrics", "cmmd"], "cmmd is defined for the extractor clip"),
        (["--images", "{}", "--reference", "{}", "--metrics", "memorization"], "memorization is against the training"),
        (["--images", "{}", "--reference", "{}", "--metrics", ","], "no metric is asked for; there are fd,"),
        (["--images", "{}", "--reference", "{}", "--num-images", "51"], "has 50 images, and 51 are asked for"),
        (["--images", "{}", "--reference", "{}", "--num-reference", "0"], "--num-reference 0 must be at least 1"),
        (["--images", "{}", "--reference", "{}", "--protocol", "emoji"], "unknown protocol emoji (the nearest"),
        (["--images", "{}", "--save-statistics", "s.txt"], "--save-statistics s.txt must end in .npz"),
    ],
)
def test_bad_requests_are_one_line(words: list[str], message: str, folder: str, capsys: Any) -> None:
    words = [word.format(folder) for word in words]
    assert main(["evaluate", *words, "--extractor", "tiny"]) == 1
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "image/s" not in line and line.strip()]
    assert message in lines[-1]
    assert len(lines) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("efficientnet-lite0", None, "no file of weights at"),
        ("efficientnet-lite0", b"no weights", "w.pth is no file of weights"),
        ("efficientnet-lite0", {}, "w.pth does not fit the configuration: 296 tensors missing"),
        ("efficientnet-lite0", [1], "w.pth is no file of weights: it holds list"),
        ("inception", None, "no file of weights at"),
        ("dinov2", b"", "is a file; a model is a folder"),
        ("clip", None, "no folder"),
    ],
)
def test_wrong_weights_are_one_line(
    name: str, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises((ValueError, OSError)) as caught:
        load_extractor(name, path)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_extractor_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown extractor inceptoin \(the nearest known name is inception\)"):
        load_extractor("inceptoin")
