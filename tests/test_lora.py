"""LoRA: what adapters do is what weights merged by hand do, in every projection, in training and in sampling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from madformer import MADFormer, MADFormerPipeline
from madformer.bulk.records import read_record
from madformer.cli.info import command as described
from madformer.cli.main import main
from madformer.conditioning.prompt import Prompt
from madformer.config import emoji64
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model.lora import TARGETS, add_lora, lora_config
from madformer.pipeline_lora import WEIGHTS
from tests.helpers.engine_cases import FLAT
from tests.helpers.testing import perturb, relative_error

pytest.importorskip("peft")

CONFIGS = {
    "three towers": emoji64().replace(num_layers=2, diffusion_layers=1, num_classes=0, time_conditioning="unet"),
    "AdaLN": FLAT.replace(time_conditioning="unet+adaln"),
    "GELU, shared": FLAT.replace(mlp="gelu", shared_towers=True),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(CONFIGS[name]))
    assert isinstance(model, MADFormer)
    return model.to(dtype)


def adapted(model: MADFormer, *names: str) -> tuple[MADFormer, dict[str, dict[str, Tensor]]]:
    """With one random adapter of each name, and what each adds to every weight."""
    result = copy.deepcopy(model)
    for index, name in enumerate(names):
        config = lora_config(rank=2 + index, alpha=3)
        result.add_adapter(config, name)
    generator = torch.Generator().manual_seed(1)
    updates: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for path, module in result.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for index, name in enumerate(names):
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            for weight in (a, b):
                weight.data = (torch.randn(weight.shape, generator=generator) * 0.2).to(weight.dtype)
            updates[name][path] = 3 / (2 + index) * b.detach().float() @ a.detach().float()
    return result.eval(), updates


def merged(model: MADFormer, *updates: tuple[float, dict[str, Tensor]]) -> MADFormer:
    result = copy.deepcopy(model)
    for strength, changes in updates:
        for path, change in changes.items():
            weight = result.get_submodule(path).weight
            weight.data = (weight.data.float() + strength * change).to(weight.dtype)
    return result


def inputs(model: MADFormer) -> dict[str, Any]:
    config, generator = model.config, torch.Generator().manual_seed(2)
    shape = (2, 2, config.num_blocks, config.latents_per_block, config.latent_channels)
    clean, noisy = torch.randn(shape, generator=generator).to(model.dtype)
    given = {"clean_BMLC": clean, "noisy_BMLC": noisy, "timestep_BM": torch.full((2, config.num_blocks), 400)}
    if config.text is not None:
        given["text_BT"] = torch.randint(0, 256, (2, config.text_length), generator=generator)
    return given


def drawn(model: MADFormer, sampler: Sampler | None = None) -> Tensor:
    sampler = sampler or Sampler(model, DDIMScheduler(clip_sample=False))
    given = inputs(model)
    prompt = Prompt(text=given["text_BT"]) if "text_BT" in given else None
    return sampler.plan(2, SamplingOptions(2)).run(given["noisy_BMLC"].float(), prompt)


def assert_same(model: MADFormer, expected: MADFormer, bound: float = 2e-5, sampler: Sampler | None = None) -> None:
    with torch.no_grad():
        own, other = model(**inputs(model)), expected(**inputs(expected))
        for name in other:
            assert relative_error(own[name].float(), other[name].float()) < bound, name
        assert relative_error(drawn(model, sampler), drawn(expected)) < bound


OFTEN = [name if name == "AdaLN" else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


@pytest.mark.parametrize("name", OFTEN)
def test_every_projection(name: str) -> None:
    model = make(name)
    network, updates = adapted(model, "style")
    paths = set(updates["style"])
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert paths == {path for path in linear if path.rpartition(".")[2] in TARGETS and path.startswith("layers.")}
    # one at a time: nothing of a layer is lost behind the others
    with torch.no_grad():
        base = model(**inputs(model)).prediction
    for path in sorted(paths):
        for other in paths:
            network.get_submodule(other).scaling["style"] = 1.5 * (other == path)
        expected = merged(model, (1.0, {path: updates["style"][path]}))
        with torch.no_grad():
            output, reference = (other(**inputs(other)).prediction for other in (network, expected))
        assert relative_error(output, reference) < 1e-5, path
        unread = path.startswith("layers.1.towers.text") and not path.endswith("qkv")
        unread |= path.startswith("layers.2.towers.clean") and not path.endswith("qkv")
        unread |= path.startswith("layers.1.towers.clean") and not path.endswith("qkv") and model.config.num_layers == 2
        assert (relative_error(reference, base) > 1e-5) != unread, path
    for path in paths:
        network.get_submodule(path).scaling["style"] = 1.5
    assert_same(network, merged(model, (1.0, updates["style"])))


@pytest.mark.parametrize("name", OFTEN)
def test_strength_fusing_and_several(name: str) -> None:
    """Through one sampler, which has packed the weights before they change."""
    model = make(name)
    network, updates = adapted(model, "style", "subject")
    sampler = Sampler(network, DDIMScheduler(clip_sample=False))
    style, subject = updates["style"], updates["subject"]
    for weights in ([1.0, 1.0], [0.3, -0.5], [0.0, 2.0]):
        network.set_adapters(["style", "subject"], weights)
        assert_same(network, merged(model, (weights[0], style), (weights[1], subject)), sampler=sampler)
    network.set_adapters("style", 0.7)
    assert_same(network, merged(model, (0.7, style)), sampler=sampler)
    network.fuse_lora()
    assert_same(network, merged(model, (0.7, style)), sampler=sampler)
    network.unfuse_lora()
    network.disable_lora()
    assert_same(network, model, sampler=sampler)
    network.enable_lora()
    assert_same(network, merged(model, (0.7, style)), sampler=sampler)
    network.delete_adapters("style")
    network.set_adapters("subject")
    assert_same(network, merged(model, (1.0, subject)), sampler=sampler)
    network.fuse_lora(lora_scale=0.5)
    network.unload_lora()
    assert_same(network, merged(model, (0.5, subject)), sampler=sampler)


def test_bf16() -> None:
    model = make("three towers", torch.bfloat16)
    network, updates = adapted(model, "style")
    assert_same(network, merged(model, (1.0, updates["style"])), bound=0.05)


def test_saving(tmp_path: Path) -> None:
    model = make("AdaLN")
    network, updates = adapted(model, "style")
    with pytest.raises(ValueError, match="has adapters \\(style\\)"):
        network.save_pretrained(tmp_path)
    network.save_lora_adapter(tmp_path, adapter_name="style")
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    loaded = copy.deepcopy(model)
    loaded.load_lora_adapter(str(tmp_path), prefix=None)
    assert_same(loaded, merged(model, (1.0, updates["style"])))
    network.fuse_lora()
    network.unload_lora()
    network.save_pretrained(tmp_path)
    assert_same(MADFormer.from_pretrained(tmp_path), merged(model, (1.0, updates["style"])))


def test_a_new_adapter_changes_nothing_and_alone_is_trained() -> None:
    model = make("three towers")
    network = add_lora(copy.deepcopy(model), rank=2, targets=["qkv"])
    assert_same(network, model)
    network(**inputs(network)).prediction.square().mean().backward()
    trained = {path for path, parameter in network.named_parameters() if parameter.grad is not None}
    assert trained == {path for path, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {path for path, _ in network.named_parameters() if ".qkv.lora_" in path}
    for options, why in (({"rank": 0}, "at least 1"), ({"rank": 2, "targets": ["attention"]}, "must be some of")):
        with pytest.raises(ValueError, match=why):
            add_lora(copy.deepcopy(model), **options)  # type: ignore[arg-type]


def test_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line merges adapters, and says so in what it writes."""
    model = make("AdaLN")
    network, updates = adapted(model, "style")
    network.save_lora_adapter(tmp_path / "style", adapter_name="style")
    weights = {f"transformer.{name}": x for name, x in load_file(tmp_path / "style" / WEIGHTS).items()}
    from peft import get_peft_model_state_dict

    metadata = network.peft_config["style"].to_dict()
    layers = get_peft_model_state_dict(network, adapter_name="style")
    MADFormerPipeline.save_lora_weights(tmp_path / "style", layers, transformer_lora_adapter_metadata=metadata)
    MADFormerPipeline(model, None, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "model")
    command = ["sample", "--model", tmp_path / "model", "--lora-strength", 0.25, "--lora", tmp_path / "style"]
    options = ["--steps", 2, "--latents", "--precision", "exact", "--device", "cpu", "--out", tmp_path / "out"]
    assert main([*map(str, (*command, *options))]) == 0
    file = tmp_path / "out" / "00000000.safetensors"
    expected = MADFormerPipeline(merged(model, (0.25, updates["style"])), None, DDIMScheduler(clip_sample=False))
    images = expected(num_inference_steps=2, seed=0, output_type="latent").images
    assert relative_error(load_file(file)["latents"], images[0]) < 2e-5
    record = read_record(file)
    assert (record["lora"]["name"], record["lora"]["strength"]) == ("style", 0.25)
    assert "--lora style --lora-strength 0.25" in str(described(record))
    other = {name: x[:, :-1].contiguous() if "lora_A" in name else x for name, x in weights.items()}
    for name, content in (("none", None), ("shapes", other), ("foreign", {"unet.x.lora_A.weight": torch.zeros(1, 1)})):
        (tmp_path / name).mkdir()
        if content is not None:
            save_file(content, tmp_path / name / WEIGHTS)
        capsys.readouterr()
        assert main([*map(str, (*command[:-1], tmp_path / name, *options))]) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert (f"holds no {WEIGHTS}" if content is None else "holds no adapters of this model") in message


def test_pipeline(tmp_path: Path) -> None:
    model = make("AdaLN")
    network, updates = adapted(model, "style")
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(network, adapter_name="style")
    metadata = network.peft_config["style"].to_dict()
    MADFormerPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)

    def draw(transformer: MADFormer | None = None) -> Tensor:
        drawing = pipeline if transformer is None else MADFormerPipeline(transformer, None, pipeline.scheduler)
        return drawing(num_images=1, num_inference_steps=2, seed=0, output_type="latent").images

    pipeline = MADFormerPipeline(copy.deepcopy(model), None, DDIMScheduler(clip_sample=False))
    base = draw()
    pipeline.load_lora_weights(str(tmp_path), adapter_name="style")
    assert pipeline.get_active_adapters() == ["style"]
    assert relative_error(draw(), draw(merged(model, (1.0, updates["style"])))) < 2e-5
    pipeline.set_adapters("style", 0.25)
    quarter = draw(merged(model, (0.25, updates["style"])))
    assert relative_error(draw(), quarter) < 2e-5
    assert relative_error(base, quarter) > 1e-3
    pipeline.fuse_lora()
    assert relative_error(draw(), quarter) < 2e-5
    pipeline.unfuse_lora()
    pipeline.disable_lora()
    assert relative_error(draw(), base) < 2e-5
    pipeline.enable_lora()
    assert relative_error(draw(), quarter) < 2e-5
    pipeline.unload_lora_weights()
    assert relative_error(draw(), base) < 2e-5
