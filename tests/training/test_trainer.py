"""The run: order of the data, schedule, averaging, and resuming as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from madformer.config import TextConfig
from madformer.engine.schedulers import converted
from madformer.pipeline import MADFormerPipeline
from madformer.training.config import PRESETS, TrainingConfig
from madformer.training.data import draw_split
from madformer.training.losses import Batch
from madformer.training.optimization import MovingAverages, StepGuard, learning_rate_factor
from madformer.training.trainer import Trainer
from tests.helpers.training_run import ROUNDING, losses, metrics, stop_after


def test_a_run_leaves_a_model_to_sample_from(unbroken: Path) -> None:
    assert [record["step"] for record in metrics(unbroken)] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "image", "hidden", "grad_norm", "lr", "images_per_second", "mfu"} <= metrics(unbroken)[0].keys()
    assert [path.name for path in sorted((unbroken / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    trainer = Trainer.from_folder(unbroken)
    pipeline = MADFormerPipeline.from_pretrained(unbroken / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2).images[0].size == (16, 16)
    averaged, raw = pipeline.transformer.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(averaged[name], tensor) for name, tensor in trainer.averages.weights[0.9].items())
    assert any(not torch.equal(averaged[name], tensor) for name, tensor in raw.items())


@pytest.mark.parametrize(
    "cache_latents", [pytest.param(False, id="images"), pytest.param(True, id="cached latents", marks=pytest.mark.slow)]
)
def test_resume_is_exact(config: TrainingConfig, unbroken: Path, tmp_path: Path, cache_latents: bool) -> None:
    """Stopped by SIGTERM after three steps and resumed: bit for bit the losses and weights of the unbroken run."""
    config = dataclasses.replace(config, cache_latents=cache_latents)
    if cache_latents:
        Trainer(config, unbroken := tmp_path / "whole").run()
    whole = Trainer.from_folder(unbroken)
    trainer = Trainer(config, tmp_path / "broken")
    step = trainer._train_step

    def stop_after_three(batches: Iterator[Batch]) -> dict[str, Tensor]:
        record = step(batches)
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    trainer._train_step = stop_after_three  # type: ignore[method-assign]
    trainer.run()
    assert trainer.checkpoints.paths()[-1].name == "step-00000003"
    resumed = Trainer.from_folder(tmp_path / "broken")
    assert resumed.step == 3
    resumed.run()
    assert losses(tmp_path / "broken") == losses(unbroken)
    for ours, theirs in ((resumed.model, whole.model), (resumed.averages, whole.averages)):
        assert_equal(ours.state_dict(), theirs.state_dict())


def assert_equal(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Mapping):
            assert_equal(actual[name], value)
        else:
            assert torch.equal(actual[name], value), name


def test_what_was_reported_after_the_checkpoint_is_forgotten(config: TrainingConfig, tmp_path: Path) -> None:
    """As after a kill: three steps, a checkpoint at the second, and a line that was cut off."""
    trainer = Trainer(config, tmp_path)
    stop_after(trainer, 3)
    trainer.save = lambda: None if trainer.step == 3 else Trainer.save(trainer)  # type: ignore[method-assign]
    trainer.run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    Trainer.from_folder(tmp_path).run()
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(config: TrainingConfig, tmp_path: Path) -> None:
    """What the steps change while it is being written is not in it."""
    trainer = Trainer(config, tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.checkpoints.save(trainer.state)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(7)
    trainer.checkpoints.finish()
    assert_equal(Trainer(config, tmp_path, resume=True).model.state_dict(), before)


@pytest.mark.usefixtures("no_checkpoints")
def test_bf16_on_a_processor(
    config: TrainingConfig, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has the units: products in bf16, weights, gradients and averages in fp32, and nearly fp32's losses."""
    monkeypatch.setattr("madformer.training.trainer.matmul_rate", lambda *_: 1e9)
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: precision == "bf16")  # noqa: B023
        trainer = Trainer(dataclasses.replace(config, precision="auto"), tmp_path / precision)
        assert trainer.config.precision == precision
    seen: set[torch.dtype] = set()
    layer: Any = trainer.model.layers[-1]
    hook = layer.tower("noise").qkv.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
        parameter.register_hook(lambda gradient: seen.add(gradient.dtype))
    trainer.run()
    hook.remove()
    assert seen == {torch.bfloat16, torch.float32}
    kept = (*trainer.model.parameters(), *trainer.averages.weights[0.9].values())
    moments = (value for state in trainer.optimizer.state.values() for value in state.values())
    assert {tensor.dtype for tensor in (*kept, *moments)} == {torch.float32}
    assert losses(tmp_path / "bf16") == pytest.approx(losses(unbroken), rel=0.02)


def test_accumulation_accumulates(config: TrainingConfig, tmp_path: Path) -> None:
    """The released loop throws all micro-batches but the last away."""
    curves = []
    for steps in (1, 4):
        config = dataclasses.replace(config, accumulation_steps=steps, save_every=6)
        Trainer(config, tmp_path / str(steps)).run()
        curves.append(losses(tmp_path / str(steps)))
    assert curves[1] == pytest.approx(curves[0], rel=ROUNDING)


def test_a_run_is_not_overwritten(config: TrainingConfig, unbroken: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        Trainer(config, unbroken)


def test_divergence_stops_and_names_the_last_good_checkpoint(config: TrainingConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, steps=40, max_skipped_steps=3, warmup=0.0)
    trainer = Trainer(config, tmp_path)
    step = trainer._train_step

    def poison(batches: Iterator[Batch]) -> dict[str, Tensor]:
        if trainer.step == 5:
            with torch.no_grad():
                trainer.model.boi.fill_(torch.nan)
        return step(batches)

    trainer._train_step = poison  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"the last 4 steps up to 9 .* last good checkpoint: .*step-00000004$"):
        trainer.run()


@pytest.mark.usefixtures("no_checkpoints")
def test_one_bad_batch_changes_nothing(config: TrainingConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path)
    step = trainer._train_step

    def spoil(batches: Iterator[Batch]) -> dict[str, Tensor]:
        if trainer.step != 2:
            return step(batches)
        batch = next(batches)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        record = step(iter([dataclasses.replace(batch, noise_BMLC=batch.noise_BMLC * torch.inf)]))
        assert_equal(trainer.model.state_dict(), before)
        return record

    trainer._train_step = spoil  # type: ignore[method-assign]
    trainer.run()
    assert [record["skipped_steps"] for record in metrics(tmp_path)] == [0, 0, 1, 1, 1, 1]
    assert math.isfinite(losses(tmp_path)[-1])


def test_explosions_are_skipped() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = StepGuard(optimizer, torch.device("cpu"), explosion=10)
    norms = [100.0, *[1.0] * 30, 9.0, 20.0, 1.0]
    taken = []
    for norm in norms:
        weight.grad = torch.ones(1)
        before = weight.item()
        guard.step(torch.tensor(norm))
        taken.append(weight.item() != before)
    # by the end the first norm still counts 0.99**30 times: the mean is near 4, not 1
    assert taken == [True] * 32 + [True, True]
    for norm, good in ((200.0, False), (float("nan"), False), (1.0, True)):
        before = weight.item()
        guard.step(torch.tensor(norm))
        assert (weight.item() != before) == good
    assert guard.skipped == 2
    assert guard.in_a_row == 0


def test_a_damaged_checkpoint_is_named(config: TrainingConfig, tmp_path: Path) -> None:
    Trainer(dataclasses.replace(config, steps=1), tmp_path).run()
    (part,) = (tmp_path / "checkpoints" / "step-00000001").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000001 is damaged"):
        Trainer.from_folder(tmp_path)


@pytest.mark.usefixtures("no_checkpoints")
def test_samples_traces_and_event_files(config: TrainingConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, sample_every=3, sample_images=3, sample_steps=2, profile_steps=1)
    Trainer(config, tmp_path).run()
    assert [file.name for file in sorted((tmp_path / "samples").iterdir())] == [
        "step-00000003.png",
        "step-00000006.png",
    ]
    assert Image.open(tmp_path / "samples" / "step-00000006.png").size == (32, 32)
    assert len(list((tmp_path / "traces").glob("*.pt.trace.json"))) == 1
    assert json.loads((tmp_path / "environment.json").read_text())["processes"] == 1


def test_geometry_must_fit_the_latents(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"images of 32 x 32 pixels: latents are 4 x 16 x 16, the model takes 4 x 8 x 8"
    ):
        Trainer(dataclasses.replace(config, image_size=32), tmp_path)


def test_missing_data_and_vae(config: TrainingConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Trainer(dataclasses.replace(config, data=str(tmp_path / "nowhere")), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no readable AutoencoderKL"):
        Trainer(dataclasses.replace(config, vae=str(tmp_path)), tmp_path / "run")


# Parts


def factors(**changes: Any) -> list[float]:
    config = TrainingConfig(steps=1000, **changes)
    return [learning_rate_factor(config, step) for step in range(1001)]


def test_wsd_has_three_parts() -> None:
    values = factors(warmup=0.01, decay_start=0.85, decay_exponent=6)
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(values[10:850]) == {1.0}
    assert values[925] == pytest.approx(0.5**3)
    assert values[1000] == pytest.approx(0.5**6)


def test_cosine_and_constant() -> None:
    values = factors(schedule="cosine", warmup=0.1, min_learning_rate=0.2)
    assert values[100] == 1.0
    assert values[550] == pytest.approx(0.6)
    assert values[1000] == pytest.approx(0.2)
    assert set(factors(schedule="constant", warmup=0.1)[100:]) == {1.0}


def test_average_forgets_its_start() -> None:
    """``sum of (1 - d) d^k w`` in the end; the first steps use a shorter memory."""
    model = nn.Linear(1, 1, bias=False)
    averages = MovingAverages(model, (0.5, 0.0))
    expected = model.weight.item()
    for step in range(8):
        with torch.no_grad():
            model.weight.fill_(float(step))
        averages.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert averages.weights[0.5]["weight"].item() == pytest.approx(expected)
    assert averages.weights[0.0]["weight"].item() == 7
    assert model.weight.item() == 7


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    config = PRESETS[name]()
    assert TrainingConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 5, "accumulation_steps": 2},
        {"precision": "fp8"},
        {"warmup": 0.9},
        {"ema_decays": (0.9, 1.0)},
        {"schedule": "linear"},
        {"hidden_loss_weight": -1.0},
        {"compile_mode": "max-autotune", "compile": True},
        {"compile_mode": "reduce-overhead"},
        {"compile_mode": "reduce-overhead", "compile": True, "accumulation_steps": 2, "batch_size": 4},
        {"compile_mode": "reduce-overhead", "compile": True, "parallel": "fsdp"},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        dataclasses.replace(TrainingConfig(), **changes)


@pytest.mark.usefixtures("no_checkpoints", "untraced")
def test_layers_are_compiled_as_asked(config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step computed is forgotten before the next one begins, where CUDA graphs hold it."""
    compiled: list[dict[str, Any]] = []
    begun: list[int] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(options))
    config = dataclasses.replace(config, compile=True, steps=3)
    for mode in ("default", "reduce-overhead"):
        with contextlib.nullcontext() if mode == "default" else pytest.warns(UserWarning, match="no CUDA graphs"):
            trainer = Trainer(dataclasses.replace(config, compile_mode=mode), tmp_path / mode)
        assert compiled == [{"mode": mode}] * (config.model.num_layers + 2)  # and the halves of the U-Net
        compiled.clear()
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda run=trainer: begun.append(run.step))
        trainer.run()
    assert begun == [0, 1, 2]


@pytest.mark.slow
def test_reduced_overhead_changes_no_loss(config: TrainingConfig, unbroken: Path, tmp_path: Path) -> None:
    """On a CPU, where it says that it does nothing."""
    compiled = dataclasses.replace(config, compile=True, sample_every=0)
    Trainer(compiled, tmp_path / "compiled").run()
    with pytest.warns(UserWarning, match="compile_mode='reduce-overhead' has no effect on cpu"):
        trainer = Trainer(dataclasses.replace(compiled, compile_mode="reduce-overhead"), tmp_path / "reduced")
    trainer.run()
    assert losses(tmp_path / "reduced") == losses(tmp_path / "compiled")
    assert losses(tmp_path / "reduced") == pytest.approx(losses(unbroken), rel=1e-4)


# Text, classes, an elastic split


@pytest.fixture(scope="module")
def captioned(config: TrainingConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """The images in two classes, with captions, for a model that is told both."""
    folder = tmp_path_factory.mktemp("captioned")
    for index, image in enumerate(sorted(Path(config.data).iterdir())):
        target = folder / "ab"[index % 2] / image.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(image, target)
        target.with_suffix(".txt").write_text(f"picture {index}")
    model = config.model.replace(text=TextConfig(257, 10, 256), num_classes=2, time_conditioning="unet+adaln")
    return dataclasses.replace(config, data=str(folder), model=model, text_loss_weight=0.1, caption_dropout=0.3)


@pytest.mark.parametrize(
    "cache_latents", [pytest.param(False, id="images"), pytest.param(True, id="cached latents", marks=pytest.mark.slow)]
)
def test_a_model_of_text_and_classes_trains_and_resumes(
    captioned: TrainingConfig, tmp_path: Path, cache_latents: bool
) -> None:
    config = dataclasses.replace(captioned, cache_latents=cache_latents, steps=3)
    Trainer(config, tmp_path / "whole").run()
    assert all(record["text"] > 0 for record in metrics(tmp_path / "whole"))
    trainer = Trainer(config, tmp_path / "broken")
    stop_after(trainer, 2)
    trainer.run()
    Trainer.from_folder(tmp_path / "broken").run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.usefixtures("no_checkpoints", "untraced")
def test_what_the_model_is_told_changes_the_losses(captioned: TrainingConfig, tmp_path: Path) -> None:
    """Nothing else differs between these runs: the losses would be the same if texts or labels were not read."""
    kept = {"text_loss_weight": 0.0, "caption_dropout": 0.0, "label_dropout": 0.0}
    config = dataclasses.replace(captioned, steps=3, learning_rate=0.03, **kept)
    curves = []
    for changes in ({}, {"caption_dropout": 1.0}, {"label_dropout": 1.0}):
        folder = tmp_path / str(len(curves))
        Trainer(dataclasses.replace(config, **changes), folder).run()
        curves.append(losses(folder))
    assert curves[0][0] != curves[1][0]  # a text is read from the first step on
    assert curves[0][0] == curves[2][0]  # AdaLN begins as nothing,
    assert curves[0][2] != curves[2][2]  # and learns


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(captioned: TrainingConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(captioned, model=captioned.model.replace(text=TextConfig(100, 10)))
    with pytest.raises(ValueError, match=r"the tokenizer has 257 tokens, and the model text\.vocab_size=100"):
        Trainer(config, tmp_path)


@pytest.mark.usefixtures("no_checkpoints", "untraced")
def test_an_elastic_model_trains_every_split(config: TrainingConfig, tmp_path: Path) -> None:
    """Its first step is that of a model of the split that was drawn."""
    model = config.model.replace(num_layers=3, elastic_diffusion_layers=(1, 2, 3))
    seeds = {draw_split(model, seed, 0): seed for seed in range(8)}
    assert seeds.keys() == {1, 2, 3}
    for split in (1, 3):
        elastic = dataclasses.replace(config, model=model, seed=seeds[split], steps=1)
        Trainer(elastic, tmp_path / f"elastic {split}").run()
        fixed = dataclasses.replace(elastic, model=config.model.replace(num_layers=3, diffusion_layers=split))
        Trainer(fixed, tmp_path / f"fixed {split}").run()
        assert losses(tmp_path / f"elastic {split}") == losses(tmp_path / f"fixed {split}")


@pytest.mark.usefixtures("no_checkpoints", "untraced")
@pytest.mark.parametrize("block_order", ["spiral", pytest.param("random", marks=pytest.mark.slow)])
def test_images_that_are_no_squares_in_another_order(config: TrainingConfig, tmp_path: Path, block_order: str) -> None:
    """24 x 16 pixels, in six blocks; latents encoded before give the losses of images encoded in passing."""
    model = config.model.replace(num_blocks=6, block_grid=(3, 2), block_order=block_order)
    tall = dataclasses.replace(config, model=model, steps=2, sample_every=2, sample_images=2, sample_steps=2)
    assert tall.image_shape == (24, 16)
    found = {}
    for cached in (False, True):
        folder = tmp_path / str(cached)
        Trainer(dataclasses.replace(tall, cache_latents=cached), folder).run()
        found[cached] = losses(folder)
    assert found[True] == pytest.approx(found[False], rel=ROUNDING)
    pipeline = MADFormerPipeline.from_pretrained(folder / "model", vae=tall.vae, dtype=torch.float32)
    assert pipeline(num_inference_steps=2).images[0].size == (16, 24)


@pytest.mark.usefixtures("no_checkpoints", "untraced")
def test_samples_and_the_saved_pipeline_are_of_the_datas_prompts(captioned: TrainingConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        captioned, steps=1, sample_every=1, sample_images=4, sample_steps=2, sample_guidance=2.0
    )  # fmt: skip
    trainer = Trainer(config, tmp_path)
    assert trainer._told() == {"prompt": ["picture 0", "picture 4", "picture 1", "picture 5"], "labels": [0, 0, 1, 1]}
    trainer.run()
    with Image.open(tmp_path / "samples" / "step-00000001.png") as grid:
        assert grid.size == (32, 32)
    pipeline = MADFormerPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert (
        len(pipeline(num_inference_steps=2, prompt=["picture 3", "a cat"], labels=["b", 0], guidance_scale=2.0).images)
        == 2
    )


@pytest.mark.usefixtures("no_checkpoints", "untraced")
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_run_samples_on_the_schedule_it_trains_on(
    config: TrainingConfig, tmp_path: Path, prediction_type: Any, beta_schedule: Any, zero_terminal_snr: bool
) -> None:
    changes = {"beta_schedule": beta_schedule, "zero_terminal_snr": zero_terminal_snr, "min_snr_gamma": 5.0, "steps": 1}
    model = config.model.replace(prediction_type=prediction_type)
    if zero_terminal_snr and prediction_type == "epsilon":
        with pytest.raises(ValueError, match="zero_terminal_snr=True needs another prediction_type"):
            dataclasses.replace(config, model=model, **changes)
        return
    trainer = Trainer(dataclasses.replace(config, model=model, **changes), tmp_path)
    trainer.run()
    pipeline = MADFormerPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trained, sampled = trainer.noise_schedule.alphas_cumprod, pipeline.scheduler.alphas_cumprod
    assert torch.equal(trained[:-1], sampled[:-1])
    assert (trained[-1] == 0) == zero_terminal_snr
    assert sampled[-1].item() == pytest.approx(trained[-1].item(), abs=1e-7)  # diffusers' solver needs it above 0
    if beta_schedule == "cosine" and not zero_terminal_snr:
        halfway = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        assert trained[499].item() == pytest.approx(halfway, rel=1e-3)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_a_flow_trains_resumes_and_samples(config: TrainingConfig, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "flow_sampling": "logit-normal",
        "flow_shift": 3.0,
        "min_snr_gamma": 5.0,
        "save_every": 1,
    }
    changes |= {"model": config.model.replace(prediction_type="flow"), "sample_every": 2, "sample_steps": 2}
    config = dataclasses.replace(config, steps=2, **changes)
    Trainer(config, tmp_path / "whole").run()
    Trainer(dataclasses.replace(config, steps=1), tmp_path / "resumed").run()
    Trainer(config, tmp_path / "resumed", resume=True).run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "resumed")
    pipeline = MADFormerPipeline.from_pretrained(tmp_path / "whole" / "model", dtype=torch.float32)
    assert (type(pipeline.scheduler), pipeline.scheduler.config.shift) == (FlowMatchEulerDiscreteScheduler, 3.0)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(num_inference_steps=3, output_type="latent", seed=0).images
    for name in ("flow-heun", "dpmpp"):
        pipeline.scheduler = converted(pipeline.scheduler, name)
        other = pipeline(num_inference_steps=3, output_type="latent", seed=0).images
        assert other.isfinite().all()
        assert not torch.equal(other, drawn)


@pytest.mark.parametrize(
    ("prediction_type", "changes", "message"),
    [
        ("flow", {"beta_schedule": "cosine"}, "beta_schedule='cosine' says nothing to prediction_type='flow'"),
        ("flow", {"zero_terminal_snr": True}, "zero_terminal_snr=True says nothing to prediction_type='flow'"),
        ("epsilon", {"flow_shift": 3.0}, "flow_shift=3.0 says nothing to prediction_type='epsilon'"),
        ("sample", {"flow_sampling": "logit-normal"}, "flow_sampling='logit-normal' says nothing to"),
        ("flow", {"flow_shift": 0.0}, "flow_shift=0.0 must be positive"),
        ("flow", {"flow_logit_std": -1.0}, "flow_logit_std=-1.0 must be positive"),
    ],
)
def test_noise_that_does_not_go_with_what_is_predicted(prediction_type: Any, changes: Any, message: str) -> None:
    model = TrainingConfig().model.replace(prediction_type=prediction_type)
    with pytest.raises(ValueError, match=message):
        TrainingConfig(model=model, **changes)
