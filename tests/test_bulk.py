"""Runs at length: however one was stopped, extended or shared out, the folder ends as an unbroken run leaves it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_latents

from madformer.bulk import OutputFolder, Prompts, Settings, draw_missing
from madformer.bulk.settings import fingerprint
from madformer.cli.main import main
from madformer.conditioning.tokenizer import ByteTokenizer
from madformer.config import TextConfig
from madformer.engine.options import SamplingOptions
from madformer.engine.plan import Plan
from madformer.engine.running import NonFiniteError
from madformer.engine.schedulers import default_scheduler
from madformer.files.resumable import first_difference
from madformer.files.shards import ShardDataset
from madformer.model import MADFormer
from madformer.pipeline import MADFormerPipeline
from tests.helpers.killing import Kill, statuses
from tests.helpers.testing import DEVICE, perturb, relative_error, small_config, small_vae

NUM_IMAGES = 7
# shards of 3 and batches of 2: batches that straddle shards, a last batch and a last shard that are not full
PNG = ["--batch-size", "2"]
LATENTS = [*PNG, "--latents"]
SHARDS = [*PNG, "--format", "wds", "--shard-size", "3"]
FORMATS = {"png": PNG, "latents": LATENTS, "shards": SHARDS}

TEXTS = ["red heart", "a cat", ""]
CLASSES = ["Flags", "Food & Drink"]
PROMPTED = [*(option for text in TEXTS for option in ("--prompt", text)), "--class", "Food & Drink", "--class", "0"]
PROMPTED += ["--guidance", "2.5", "--negative-prompt", "blur", "--guidance-interval", "0,900"]


def make_pipeline(*extras: Any, **changes: Any) -> MADFormerPipeline:
    torch.manual_seed(0)
    transformer = perturb(MADFormer(small_config(num_blocks=1, **changes)))
    assert isinstance(transformer, MADFormer)
    pipeline = MADFormerPipeline(transformer, small_vae(block_out_channels=(8,)), default_scheduler("epsilon"), *extras)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompted() -> MADFormerPipeline:
    """Of a model with text and classes."""
    changes = {"text": TextConfig(257, 8), "time_conditioning": "unet+adaln", "num_classes": len(CLASSES)}
    return make_pipeline(ByteTokenizer(), CLASSES, **changes)


@pytest.fixture(scope="module")
def prompted_model(prompted: MADFormerPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompted")
    prompted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What one run, that nothing happened to, leaves behind; by format."""
    made: dict[str, dict[str, bytes]] = {}

    def contents_of(name: str) -> dict[str, bytes]:
        if name not in made:
            out = tmp_path_factory.mktemp(name)
            assert main(command(model, out, *FORMATS[name])) == 0
            made[name] = contents(out)
        return made[name]

    return contents_of


def command(model: Path, out: Path, *options: object, num_images: int = NUM_IMAGES) -> list[str]:
    arguments = ["sample", "--model", model, "--out", out, "--num-images", num_images, "--steps", 2, "--seed", 5]
    return [str(argument) for argument in (*arguments, "--precision", "exact", "--device", "cpu", "--json", *options)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the locks, which are empty."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def error_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    "kills",
    [
        {"shards": [(8, False), (7, True)]},
        pytest.param(
            {
                "png": [(1, False), (1, True), (5, False), (4, True)],
                "latents": [(8, False), (5, True)],
                "shards": [(2, False), (9, False), (3, True)],
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shards", "files, latents, and the ends of shards"],
)
def test_kill_at_any_moment(
    model: Path, tmp_path: Path, unbroken: Callable[[str], dict[str, bytes]], kills: dict[str, list[tuple[int, bool]]]
) -> None:
    """SIGKILL again and again, before and after a file appears or goes, each run going on from the last one's end."""
    # (which call that makes a file appear or go, and whether behind it): 1 writes the manifest, 2 tidies up after it
    runs: list[tuple[list[str], Kill | None]] = []
    for name, moments in kills.items():
        arguments = command(model, tmp_path / name, *FORMATS[name])
        runs += [(arguments, Kill(*moment, ["os.replace", "os.unlink"])) for moment in moments] + [(arguments, None)]
    ends = iter(statuses(runs))
    for name, moments in kills.items():
        # how many calls are left for the last kill depends on the order in which threads wrote
        *killed, last_kill, end = itertools.islice(ends, len(moments) + 1)
        assert (set(killed), end) == ({-signal.SIGKILL}, 0), name
        assert last_kill in (-signal.SIGKILL, 0)
        assert contents(tmp_path / name) == unbroken(name)


def test_what_is_there_is_not_made_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    run = Plan.run

    def counting(plan: Plan, *args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(plan.batch)
        return run(plan, *args, **kwargs)

    monkeypatch.setattr(Plan, "run", counting)
    assert main(command(model, tmp_path, *PNG)) == 0
    assert (last_line(capsys)["num_drawn"], drawn) == (NUM_IMAGES, [2, 2, 2, 1])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    (tmp_path / "00000008.png").unlink()  # the fourth image: its batch is the second
    drawn.clear()
    assert main(command(model, tmp_path, *PNG)) == 0
    assert (last_line(capsys)["num_drawn"], drawn) == (2, [2])
    changed = {path.name for path in tmp_path.glob("*.png") if path.stat().st_mtime_ns != times[path]}
    assert changed == {"00000007.png", "00000008.png"}
    assert main(command(model, tmp_path, *PNG)) == 0
    assert (last_line(capsys)["num_drawn"], drawn) == (0, [2])


@pytest.mark.parametrize(("name", "first"), [("png", 5), ("latents", 6), ("shards", 1), ("shards", 5), ("shards", 6)])
def test_more_images(
    model: Path, tmp_path: Path, unbroken: Callable[[str], dict[str, bytes]], name: str, first: int
) -> None:
    """Also where a batch and a shard that were not full become so."""
    assert main(command(model, tmp_path, *FORMATS[name], num_images=first)) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["num_images"] == first
    assert main(command(model, tmp_path, *FORMATS[name])) == 0
    assert contents(tmp_path) == unbroken(name)


def test_shards_hold_what_files_hold(model: Path, tmp_path: Path, unbroken: Callable[[str], dict[str, bytes]]) -> None:
    files = unbroken("png")
    for name, data in unbroken("shards").items():
        (tmp_path / name).write_bytes(data)
    dataset = ShardDataset(tmp_path)
    assert [path.name for path in dataset.paths] == [f"images-{shard:06d}.tar" for shard in range(3)]
    assert [dataset.key(index) for index in range(len(dataset))] == [f"{5 + i:08d}" for i in range(NUM_IMAGES)]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for index in range(NUM_IMAGES):
        sample = dataset[index]
        assert sample["png"] == files[f"{5 + index:08d}.png"]
        origin = json.loads(sample["json"])
        assert (origin["seed"], origin["steps"]) == (5 + index, 2)
        assert origin["model"] == manifest["settings"]["model"]
    assert not manifest.keys() - {"version", "num_images", "complete", "settings"}
    assert manifest["complete"]


def test_pictures_and_latents_are_the_pipelines(
    model: Path, unbroken: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    pipeline = MADFormerPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(num_images_per_prompt=2, num_inference_steps=2, seed=7, output_type="latent").images
    pictures = pipeline.decode(latents)
    for offset in range(2):
        stored = load_latents(unbroken("latents")[f"{7 + offset:08d}.safetensors"])["latents"]
        torch.testing.assert_close(stored, latents[offset], rtol=1e-5, atol=1e-5)
        (tmp_path / "picture.png").write_bytes(unbroken("png")[f"{7 + offset:08d}.png"])
        theirs, ours = (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in (
            Image.open(tmp_path / "picture.png"), pictures[offset]
        ))  # fmt: skip
        assert (theirs - ours).abs().max() <= 1


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", ["png", "shards"])
def test_processes_share_the_batches(
    model: Path, tmp_path: Path, unbroken: Callable[[str], dict[str, bytes]], name: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each draws its own and nothing else; any number goes on from any other; the last one reports."""
    arguments = command(model, tmp_path, *FORMATS[name])
    as_process(monkeypatch, 1, 3)
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    seeds = {int(path.stem) for path in tmp_path.rglob("*.png")}
    assert seeds == {7, 8}  # batch 1 of 0, 1, 2, 3
    for rank in (1, 0):
        as_process(monkeypatch, rank, 2)
        assert main(arguments) == 0
        printed = capsys.readouterr().out.splitlines()
        # batch 1 was there: one process has batch 3, of one image, left, the other 0 and 2
        assert [json.loads(line)["num_drawn"] for line in printed] == ([] if rank else [4])
    assert contents(tmp_path) == unbroken(name)


def test_batches_are_dealt_without_overlap_or_gap() -> None:
    for num_images in (1, 6, 7, 100):
        folder = OutputFolder("nowhere", settings(batch_size=3), num_images)
        for world_size in (1, 2, 5, 64):
            dealt = [batch for rank in range(world_size) for batch in folder.batches(rank, world_size)]
            images = [image for batch in sorted(dealt) for image in folder.span(batch)]
            assert images == list(range(num_images))


def settings(**changes: Any) -> Settings:
    values = {
        "format": "png", "latents": True, "shard_size": None, "batch_size": 2, "seed": 0,
        "sampling": SamplingOptions(2), "precision": "exact", "model": "0",
        "scheduler": {"class": "DDIMScheduler"}, "latent_shape": (4, 8, 8), "vae": None, "vae_tile": None,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def test_other_settings_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unbroken: Callable[[str], dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, data in unbroken("png").items():
        (out / name).write_bytes(data)
    for options, expected in (
        (["--batch-size", 3], "batch_size=2, not 3"),
        (["--seed", 6], "seed=5, not 6"),
        (["--steps", 3], "steps=2, not 3"),
        (["--precision", "default"], "precision='exact', not 'default'"),
        (["--scheduler", "ddim"], "scheduler.class='DPMSolverMultistepScheduler', not 'DDIMScheduler'"),
        (["--latents"], "latents=False, not True"),
        (["--format", "wds"], "format='png', not 'wds'"),
        (["--vae-tile", 64], "vae_tile=1024, not 64"),
        (["--num-images", NUM_IMAGES - 1], f"num_images={NUM_IMAGES - 1} is less than the {NUM_IMAGES}"),
    ):
        assert expected in error_line(capsys, command(model, out, *PNG, *options))
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    other = bytearray(weights.read_bytes())
    other[-1] ^= 1
    folder = tmp_path / "model"
    for path in model.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(model)).write_bytes(bytes(other) if path == weights else path.read_bytes())
    assert "is of a run with model=" in error_line(capsys, command(folder, out, *PNG))
    assert contents(out) == unbroken("png")


@pytest.mark.parametrize("name", ["latents", "shards"])
def test_a_run_with_prompts_goes_on(prompted_model: Path, tmp_path: Path, name: str) -> None:
    """Stopped, extended and completed, by class names or numbers: the same bytes as unbroken."""
    options = [*FORMATS[name], *PROMPTED]
    assert main(command(prompted_model, tmp_path / "unbroken", *options)) == 0
    assert main(command(prompted_model, tmp_path / "resumed", *options, num_images=3)) == 0
    for file in (tmp_path / "resumed").glob("00000006.*"):
        file.unlink()
    by_number = [{"Food & Drink": "1"}.get(option, option) for option in options]
    assert main(command(prompted_model, tmp_path / "resumed", *by_number)) == 0
    assert contents(tmp_path / "resumed") == contents(tmp_path / "unbroken")


def test_images_take_prompts_and_classes_in_turn(
    prompted: MADFormerPipeline, prompted_model: Path, tmp_path: Path
) -> None:
    assert main(command(prompted_model, tmp_path / "latents", *LATENTS, *PROMPTED)) == 0
    options: dict[str, Any] = {"guidance_scale": 2.5, "negative_prompt": "blur", "guidance_interval": (0, 900)}
    drawn = [
        load_latents(file.read_bytes())["latents"] for file in sorted((tmp_path / "latents").glob("*.safetensors"))
    ]
    assert len(drawn) == NUM_IMAGES
    for image, latents in enumerate(drawn):
        told = {"prompt": TEXTS[image % 3], "labels": [1, 0][image % 2]}
        expected = prompted(
            num_images_per_prompt=1, num_inference_steps=2, **told, **options, seed=5 + image, output_type="latent"
        ).images
        assert relative_error(latents, expected[0]) < 1e-5
    assert main(command(prompted_model, tmp_path / "shards", *SHARDS, *PROMPTED)) == 0
    dataset = ShardDataset(tmp_path / "shards")
    for image in range(NUM_IMAGES):
        origin = json.loads(dataset[image]["json"])
        assert (origin["prompt"], origin["labels"]) == (TEXTS[image % 3], [1, 0][image % 2])


def test_other_prompts_are_refused(prompted_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(prompted_model, tmp_path, *LATENTS, *PROMPTED)) == 0
    before = contents(tmp_path)

    def changed(old: str, new: str) -> list[str]:
        assert old in PROMPTED
        return [new if option == old else option for option in PROMPTED]

    for options, expected in (
        (changed("a cat", "a dog"), "prompts.texts.1='a cat', not 'a dog'"),
        ([*PROMPTED, "--prompt", "more"], "prompts.texts.3='absent', not 'more'"),
        (changed("blur", ""), "prompts.negative_text='blur', not ''"),
        (changed("0", "1"), "prompts.labels.1=0, not 1"),
        (changed("2.5", "3"), "prompts.guidance_scale=2.5, not 3.0"),
        (changed("0,900", "0,800"), "prompts.guidance_interval.1=900.0, not 800.0"),
    ):
        assert expected in error_line(capsys, command(prompted_model, tmp_path, *LATENTS, *options))
    assert contents(tmp_path) == before


def test_another_tokenizer_is_another_run(prompted: MADFormerPipeline) -> None:
    class Backwards(ByteTokenizer):
        def encode(self, texts: Sequence[str], length: int) -> torch.Tensor:
            return super().encode([text[::-1] for text in texts], length)

    own = Prompts.of(prompted.reader, ["abc"], [0])
    assert own == Prompts.of(prompted.reader, ["abc"], ["Flags"])
    pipeline = MADFormerPipeline(prompted.transformer, None, prompted.scheduler, Backwards())
    other = settings(prompts=Prompts.of(pipeline.reader, ["abc"], [0]))
    assert str(first_difference(other.to_dict(), settings(prompts=own).to_dict())).startswith("prompts.token_ids=")


def test_a_manifest_from_before_there_were_prompts() -> None:
    stored = settings().to_dict()
    del stored["prompts"]
    assert first_difference(stored, settings().to_dict()) is None
    prompted = settings(prompts=Prompts(texts=("cat",))).to_dict()
    assert first_difference(stored, prompted) == "prompts.texts.0='absent', not 'cat'"


def test_overwrite(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unbroken: Callable[[str], dict[str, bytes]]
) -> None:
    """Removes what a run made, and nothing else."""
    (tmp_path / "notes.txt").write_text("mine")
    assert main(command(model, tmp_path, *SHARDS, "--latents")) == 0
    (tmp_path / "00000100.png").write_bytes(b"")
    assert main(command(model, tmp_path, *PNG, "--overwrite")) == 0
    assert contents(tmp_path) == {**unbroken("png"), "notes.txt": b"mine"}


def test_somebody_elses_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00000005.png").write_bytes(b"a picture of something else")
    before = contents(tmp_path)
    assert "holds 00000005.png but no manifest.json" in error_line(capsys, command(model, tmp_path, *PNG))
    assert contents(tmp_path) == before
    (tmp_path / "00000005.png").unlink()
    (tmp_path / "manifest.json").write_text("[]")
    assert "is no manifest of a sampling run" in error_line(capsys, command(model, tmp_path, *PNG))


def test_two_runs_at_once(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path, settings(), 4)
    with folder.opened():
        with pytest.raises(OSError, match="another process is filling"), folder.opened():
            pass
        with folder.opened(1, 2):
            pass
    with folder.opened():
        pass


def test_a_run_without_images_binds_nobody(tmp_path: Path) -> None:
    """A first batch that failed, for want of memory or because of its steps, is no run to go on with."""
    with OutputFolder(tmp_path, settings(batch_size=64), 64).opened():
        pass
    with OutputFolder(tmp_path, settings(batch_size=2), 4).opened() as folder:
        folder.write(0, b"")
    with (
        pytest.raises(ValueError, match="batch_size=2, not 64"),
        OutputFolder(tmp_path, settings(batch_size=64), 64).opened(),
    ):
        pass


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
    """Do something at the writing of an image, which happens in a thread behind the sampling."""
    write, written = OutputFolder.write, iter(range(1, 1000))

    def writing(folder: OutputFolder, image: int, data: bytes) -> None:
        if next(written) == number:
            action()
        write(folder, image, data)

    monkeypatch.setattr(OutputFolder, "write", writing)


@pytest.mark.parametrize("name", ["png", "shards"])
def test_a_full_disk(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    unbroken: Callable[[str], dict[str, bytes]], name: str,
) -> None:  # fmt: skip
    """What a worker raises is the run's one line; what was written before stays."""

    def fill() -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        stop_at(patch, 4, fill)
        message = error_line(capsys, command(model, tmp_path, *FORMATS[name]))
    assert message == "madformer sample: error: No space left on device"
    assert not json.loads((tmp_path / "manifest.json").read_text())["complete"]
    assert main(command(model, tmp_path, *FORMATS[name])) == 0
    assert last_line(capsys)["num_drawn"] < NUM_IMAGES
    assert contents(tmp_path) == unbroken(name)


@pytest.mark.parametrize("name", ["png", "latents", "shards"])
def test_files_that_were_cut_short_are_drawn_again(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    unbroken: Callable[[str], dict[str, bytes]],
    name: str,
) -> None:
    """Whatever the manifest says; nothing of them is packed."""
    files = unbroken(name)
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    names = sorted(set(files) - {"manifest.json"})
    (tmp_path / names[0]).write_bytes(b"")
    (tmp_path / names[-1]).write_bytes(files[names[-1]][:-600])
    assert main(command(model, tmp_path, *FORMATS[name])) == 0
    assert last_line(capsys)["num_drawn"] > 0
    assert contents(tmp_path) == files


def test_numbers_that_are_not_finite(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    unbroken: Callable[[str], dict[str, bytes]],
) -> None:  # fmt: skip
    run = Plan.run

    def failing(plan: Plan, noise: Any, **kwargs: Any) -> torch.Tensor:
        if len(list(tmp_path.glob("*.png"))) >= 2:
            raise NonFiniteError("image 0 of the batch is not finite from block 1, step 0 on")
        return run(plan, noise, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "run", failing)
        assert "is not finite from block 1, step 0 on" in error_line(capsys, command(model, tmp_path, *PNG))
    finished = {name: data for name, data in contents(tmp_path).items() if name != "manifest.json"}
    assert len(finished) in (2, 4)
    assert finished.items() <= unbroken("png").items()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    unbroken: Callable[[str], dict[str, bytes]], number: signal.Signals, status: int,
) -> None:  # fmt: skip
    """One line that says how to go on; whole files only; and it does go on."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stop:
            main(command(model, tmp_path, *PNG))
    assert stop.value.code == status
    message = f"madformer sample: interrupted; the same command goes on from what is in {tmp_path}"
    assert capsys.readouterr().err.splitlines() == [message]
    finished = {name: data for name, data in contents(tmp_path).items() if name != "manifest.json"}
    assert finished
    assert finished.items() <= unbroken("png").items()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(command(model, tmp_path, *PNG)) == 0
    assert contents(tmp_path) == unbroken("png")


def test_progress_counts_from_where_it_resumed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [argument for argument in command(model, tmp_path, *PNG) if argument != "--json"]
    assert main(arguments) == 0
    (tmp_path / "00000005.png").unlink()
    capsys.readouterr()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert f"5/{NUM_IMAGES}" in captured.err
    assert f"{NUM_IMAGES}/{NUM_IMAGES}" in captured.err
    assert f"{NUM_IMAGES} images in {tmp_path}: drew 2 in" in captured.out


def test_a_fingerprint_is_of_configuration_and_weights(model: Path) -> None:
    first, again = (MADFormer.from_pretrained(model / "transformer") for _ in range(2))
    config = first.config.to_dict()
    assert fingerprint(first, config) == fingerprint(again, {**config, "_name_or_path": "elsewhere"})
    assert fingerprint(first, config) != fingerprint(first, {**config, "norm_eps": 1e-3})
    with torch.no_grad():
        again.boi.view(-1)[-1] += 1e-6
    assert fingerprint(first, config) != fingerprint(again, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", 0], "--num-images 0 must be at least 1"),
        (["--seed", -1], "seed=-1 must be from 0 to 2^63 - 1"),
        (["--seed", 2**63 - NUM_IMAGES + 1], "must be from 0 to 2^63 - 1, and with it the last of 7"),
        (["--shard-size", 5], "--shard-size is for --format wds"),
        (["--format", "wds", "--grid", "g.png"], "--format wds leaves no files for --grid"),
        (["--latents", "--vae-tile", 64], "leave out --vae-tile"),
        (["--vae-tile", 6], "tile=6 must be a multiple of 4 pixels"),
        (["--steps", 5000], "num_inference_steps=5000 must be between 1"),
    ],
)
def test_bad_arguments(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], message: str
) -> None:
    assert message in error_line(capsys, command(model, tmp_path, *options))
    assert not list(tmp_path.iterdir())


def test_what_several_processes_cannot_do(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_process(monkeypatch, 0, 2)
    for option, message in (("--overwrite", "leave out --overwrite"), ("--ray", "run it without torchrun")):
        assert message in error_line(capsys, command(model, tmp_path, option))
    assert "give --out" in error_line(capsys, ["sample", "--model", str(model), "--grid", str(tmp_path / "g.png")])


def test_ray_is_an_extra(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'madformer[ray]'" in error_line(capsys, command(model, tmp_path, *PNG, "--ray"))


@pytest.mark.slow
def test_ray(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unbroken: Callable[[str], dict[str, bytes]]
) -> None:
    """Two actors fill in what is missing; what one raises is the run's one line."""
    pytest.importorskip("ray")
    out = tmp_path / "out"
    assert main(command(model, out, *SHARDS, num_images=2)) == 0
    capsys.readouterr()
    assert main(command(model, out, *SHARDS, "--ray", 2)) == 0
    assert last_line(capsys)["num_drawn"] == NUM_IMAGES - 2
    assert contents(out) == unbroken("shards")
    full = tmp_path / "full"
    (full / "00000006.png").mkdir(parents=True)  # where an image is to go
    capsys.readouterr()
    assert main(command(model, full, *PNG, "--ray", 1)) == 1
    assert "00000006.png" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_torchrun(model: Path, tmp_path: Path, unbroken: Callable[[str], dict[str, bytes]]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "madformer.cli.main"]
    run = subprocess.run([*launcher, *command(model, tmp_path, *SHARDS)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [record["world_size"] for record in records] == [2]
    assert contents(tmp_path) == unbroken("shards")


@pytest.mark.gpu
def test_decoding_beside_sampling(model: Path, tmp_path: Path) -> None:
    """What the second stream decodes is what the first has sampled, bit for bit."""
    pipeline = MADFormerPipeline.from_pretrained(model, dtype=torch.float32, device=DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    run = Settings.of(pipeline, SamplingOptions(2), precision="exact", batch_size=4)
    with OutputFolder(tmp_path, run, 32).opened() as folder:
        assert draw_missing(pipeline, folder, progress=False) == 32
    for first in range(0, 32, 4):
        for offset, picture in enumerate(pipeline(num_images_per_prompt=4, num_inference_steps=2, seed=first).images):
            assert Image.open(folder.file(first + offset)).tobytes() == picture.tobytes()
