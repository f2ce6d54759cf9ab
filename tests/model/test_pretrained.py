"""Saving and loading: every form that diffusers has, what an earlier save left behind, and what does not fit."""

from __future__ import annotations

import copy
import fcntl
import functools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from madformer import MADFormer, MADFormerConfig, MADFormerOutput
from madformer.config import emoji64, tiny
from tests.helpers.testing import perturb, small_config

PIECES = {"max_shard_size": "500KB"}
PICKLED = {"safe_serialization": False}


@functools.cache
def _made(seed: int, config: MADFormerConfig) -> MADFormer:
    torch.manual_seed(seed)
    model = MADFormer(config)
    perturb(model)
    return model.eval()


def make_model(seed: int = 0, config: MADFormerConfig | None = None) -> MADFormer:
    return copy.deepcopy(_made(seed, config or small_config()))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    own, given = model.state_dict(), other.state_dict()
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)


FORMS = {
    "one file": {},
    "shards": PIECES,
    "pickled": PICKLED,
    "pickled shards": {**PICKLED, **PIECES},
    "variant": {"variant": "fp16"},
    "shards of a variant": {"variant": "fp16", **PIECES},
    "pickled shards of a variant": {"variant": "fp16", **PICKLED, **PIECES},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("low_memory", [True, False])
def test_every_form(form: str, low_memory: bool, tmp_path: Path) -> None:
    model, variant = make_model(), FORMS[form].get("variant")
    model.save_pretrained(tmp_path, **FORMS[form])  # type: ignore[arg-type]
    assert (len(list(tmp_path.iterdir())) > 2) == ("shards" in form)
    loaded = MADFormer.from_pretrained(tmp_path, variant=variant, low_cpu_mem_usage=low_memory)
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert loaded.config._name_or_path == str(tmp_path)
    if variant:
        with pytest.raises(FileNotFoundError, match=r"holds no .*, but .*fp16"):
            MADFormer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        *((form, "one file") for form in FORMS),
        *(("one file", form) for form in FORMS),
        ("pickled shards", "shards"),
        ("shards", "pickled"),
        ("shards of a variant", "pickled shards of a variant"),
    ],
)
def test_what_an_earlier_save_left_is_not_read(earlier: str, later: str, tmp_path: Path) -> None:
    first, second = make_model(0), make_model(1)
    first.save_pretrained(tmp_path, **FORMS[earlier])  # type: ignore[arg-type]
    second.save_pretrained(tmp_path, **FORMS[later])  # type: ignore[arg-type]
    assert_same(MADFormer.from_pretrained(tmp_path, variant=FORMS[later].get("variant")), second)


def test_other_variants_stay_with_their_configuration_alone(tmp_path: Path) -> None:
    first, second = make_model(0), make_model(1)
    first.save_pretrained(tmp_path, variant="ema")
    second.save_pretrained(tmp_path)
    assert_same(MADFormer.from_pretrained(tmp_path, variant="ema"), first)
    make_model(2, tiny().replace(prediction_type="sample")).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]


def test_dtypes(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16, **PIECES)  # type: ignore[arg-type]
    for options, dtype in (
        ({}, torch.bfloat16),
        ({"low_cpu_mem_usage": False}, torch.bfloat16),
        ({"torch_dtype": torch.float32}, torch.float32),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": torch.float16, "low_cpu_mem_usage": False}, torch.float16),
    ):
        loaded = MADFormer.from_pretrained(tmp_path, **options)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert torch.equal(loaded.boi, model.boi.bfloat16().to(dtype))
        # made while the default dtype is another one
        assert torch.equal(loaded.rope.cos, model.rope.cos)
        assert torch.equal(loaded.rope.text_cos, model.rope.text_cos)


def test_configuration_of_the_demo_checkpoint_is_written_as_it_was(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "assets/emoji64/transformer"
    model = MADFormer.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("form", ["shards", "pickled"])
@pytest.mark.parametrize("content", [b"", b"text", bytes(100), None], ids=["empty", "text", "zeros", "truncated"])
def test_damaged_weights_are_named(form: str, content: bytes | None, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, **FORMS[form])  # type: ignore[arg-type]
    file = sorted(tmp_path.glob("diffusion*.[sb]*"))[-2 if form == "shards" else -1]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged") as caught:
        MADFormer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_data_alone(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path(tmp_path / "run").touch, ()

    make_model().save_pretrained(tmp_path, safe_serialization=False)
    torch.save({"boi": Bomb()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="is damaged"):
        MADFormer.from_pretrained(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"weight_map": 3}'])
def test_damaged_lists_of_shards(text: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="500KB")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        MADFormer.from_pretrained(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    make_model(config=tiny()).save_pretrained(tmp_path, max_shard_size="500KB")
    next(tmp_path.glob("*-00003-of-*")).unlink()
    with pytest.raises(OSError, match="-00003-of-") as caught:
        MADFormer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "is no JSON object"),
        ("3", "is no JSON object"),
        ('{"unet": 3}', "unet=3 must be an object"),
        ('{"text": {"length": 3}}', r"text\.vocab_size is missing"),
        ('{"hidden_size": "64"}', "must be a whole number"),
        ('{"norm_eps": null}', "norm_eps=None must be a number"),
        ('{"qk_norm": 1}', "qk_norm=1 must be true or false"),
        ('{"block_shape": 4}', "block_shape=4 must be whole numbers"),
        ('{"unet": {"attention": [1, 0]}}', r"unet\.attention=\(1, 0\) must be truth values"),
        ('{"hiden_size": 64}', "unknown configuration field hiden_size"),
    ],
)
def test_configurations_of_the_wrong_kind(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        MADFormer.from_pretrained(tmp_path)


def test_a_name_that_is_no_option(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown configuration field hiden_size"):
        MADFormer.from_pretrained(tmp_path, hiden_size=64)


def test_what_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", no_network)
    for name in (tmp_path / "none", "a/b/c/d", "someone/model"):
        with pytest.raises(FileNotFoundError, match=r"no folder .* no such repository") as caught:
            MADFormer.from_pretrained(name, local_files_only=True)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        MADFormer.from_pretrained(tmp_path / "file")


def test_hub_options_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository whose part ``transformer`` is a model, behind stand-ins for the two functions that download."""
    model = make_model()
    model.save_pretrained(tmp_path / "transformer", variant="fp16")
    asked: list[dict[str, Any]] = []

    def download(repository: str, filename: str, *, subfolder: str | None = None, **options: Any) -> str:
        asked.append(options | {"repository": repository})
        path = tmp_path / (subfolder or "") / filename
        if not path.is_file():
            raise diffusers.utils.hub_utils.EntryNotFoundError(f"no {path}")
        return str(path)

    for module in (diffusers.configuration_utils, diffusers.utils.hub_utils):
        monkeypatch.setattr(module, "hf_hub_download", download)
    options = {"revision": "0" * 40, "token": "secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    loaded = MADFormer.from_pretrained("someone/model", subfolder="transformer", variant="fp16", **options)
    assert_same(loaded, model)
    assert all(call["repository"] == "someone/model" for call in asked)
    assert all(call[name] == value for call in asked for name, value in options.items())


def test_device_map(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    assert_same(MADFormer.from_pretrained(tmp_path, device_map={"": "cpu"}), model)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to"):
        make_model().save_pretrained(tmp_path / "file")


def test_saves_that_were_killed_leave_nothing_for_ever(tmp_path: Path) -> None:
    for name in (".saving.killed", ".saving.running"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diffusion_pytorch_model.safetensors").touch()
    handle = os.open(tmp_path / ".saving.running", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    weights = "diffusion_pytorch_model.safetensors"
    make_model().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".saving.running", "config.json", weights]
    os.close(handle)
    make_model().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", weights]


def test_pushed_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[tuple[str, list[str], dict[str, Any]]] = []

    class Repository:
        repo_id = "someone/model"

    def upload(*, folder_path: str, repo_id: str, **options: Any) -> None:
        uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), options))

    def create(repo_id: str, **options: Any) -> Repository:
        assert repo_id in ("model", "someone/model")
        return Repository()

    for module in ("diffusers.models.modeling_utils", "diffusers.utils.hub_utils"):
        monkeypatch.setattr(f"{module}.create_repo", create)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    no_card = diffusers.utils.hub_utils.EntryNotFoundError("none yet")
    monkeypatch.setattr("diffusers.utils.hub_utils.ModelCard.load", lambda *_, **__: (_ for _ in ()).throw(no_card))

    model = make_model()
    model.save_pretrained(tmp_path / "model", push_to_hub=True, token="secret", commit_message="better")
    model.push_to_hub("someone/model", variant="fp16")
    weights = "diffusion_pytorch_model{}.safetensors"
    assert uploads[0][1] == ["README.md", "config.json", weights.format("")]
    assert (uploads[0][2]["token"], uploads[0][2]["commit_message"]) == ("secret", "better")
    assert uploads[1][1] == ["README.md", "config.json", weights.format(".fp16")]
    assert [upload[0] for upload in uploads] == ["someone/model"] * 2
    assert_same(MADFormer.from_pretrained(tmp_path / "model"), model)
    assert (tmp_path / "model" / "README.md").is_file()


def test_moving_average_of_diffusers(tmp_path: Path) -> None:
    model = make_model()
    average = EMAModel(model.parameters(), decay=0.75, model_cls=MADFormer, model_config=model.config)
    expected = copy.deepcopy(model)
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1)
        average.step(model.parameters())
        decay = 0 if step == 0 else min(0.75, (1 + step) / (10 + step))
        with torch.no_grad():
            for own, new in zip(expected.parameters(), model.parameters(), strict=True):
                own.lerp_(new, 1 - decay)
    average.save_pretrained(str(tmp_path))
    loaded = EMAModel.from_pretrained(str(tmp_path), MADFormer)
    assert (loaded.decay, loaded.optimization_step) == (0.75, 3)
    for shadow, parameter in zip(loaded.shadow_params, expected.parameters(), strict=True):
        torch.testing.assert_close(shadow, parameter.detach())
    loaded.store(model.parameters())
    loaded.copy_to(model.parameters())
    assert_same(model, MADFormer.from_pretrained(tmp_path))
    assert MADFormer.from_pretrained(tmp_path).config == model.config


def test_auto_model_finds_the_class(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is MADFormer
    assert_same(loaded, model)
    fresh = AutoModel.from_config(str(tmp_path))
    assert type(fresh) is MADFormer
    assert fresh.config == model.config


def test_auto_model_runs_a_folder_of_code(tmp_path: Path) -> None:
    """As repositories with code of their own have it: a module beside the weights that ``auto_map`` names."""
    (tmp_path / "modeling.py").write_text("from madformer import MADFormer as Network\n")
    model = make_model()
    model.register_to_config(auto_map={"AutoModel": "modeling.Network"})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {"AutoModel": "modeling.Network"}
    assert_same(AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True), model)


def test_configuration_is_a_mapping() -> None:
    config = tiny()
    assert (config["hidden_size"], config["_class_name"], config.get("nothing")) == (64, "MADFormer", None)
    assert {**config} == {"_class_name": "MADFormer", **config.to_dict()}
    assert json.loads(json.dumps(dict(config))) == dict(config)
    for given in (config, dict(config), config.to_dict()):
        assert MADFormer.from_config(given).config == config
        assert MADFormer(given).config == config
    assert MADFormer(**config.to_dict()).config == config
    assert MADFormer(**vars(config)).config == config
    assert MADFormer(config, num_layers=4).config == config.replace(num_layers=4)
    with pytest.raises(ValueError, match="unknown configuration field depth"):
        MADFormer(config, depth=3)
    assert hash(config) == hash(tiny())


def test_registered_values(tmp_path: Path) -> None:
    model = make_model()
    model.register_to_config(note=[1, 2], prediction_type="sample", _private=3)
    assert (model.config.note, model.config["note"], model.config.prediction_type) == ([1, 2], [1, 2], "sample")
    assert model.config == small_config(prediction_type="sample")
    assert model.config.replace(num_layers=4).note == [1, 2]
    with pytest.warns(FutureWarning, match="config attribute"):
        assert model.hidden_size == 64
    with pytest.raises(AttributeError, match="'MADFormer' object has no attribute 'nothing'"):
        model.nothing  # noqa: B018
    model.save_pretrained(tmp_path)
    loaded = MADFormer.from_pretrained(tmp_path)
    assert (loaded.config.note, loaded.config.get("_private")) == ([1, 2], None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config.note == [1, 2]
        assert_same(other, model)


def test_a_model_that_is_not_its_configuration_is_not_saved(tmp_path: Path) -> None:
    model = make_model()
    nn.utils.parametrizations.weight_norm(model.layers[0].towers["noise"].proj)
    with pytest.raises(ValueError, match="the model as it is does not fit the configuration") as caught:
        model.save_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({**state, "more": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"1 tensors unexpected \(more\)"):
        MADFormer.from_pretrained(tmp_path)
    save_file({name: tensor for name, tensor in state.items() if name != "boi"}, file)
    with pytest.raises(ValueError, match=r"1 tensors missing \(boi\)"):
        MADFormer.from_pretrained(tmp_path)


def test_outputs() -> None:
    config = emoji64().replace(num_layers=2, diffusion_layers=1)
    model = make_model(config=config)
    latents = torch.randn(1, config.num_blocks, config.latents_per_block, config.latent_channels)
    timestep, text = torch.full((1, config.num_blocks), 7), torch.zeros(1, config.text_length, dtype=torch.int64)
    arguments = (latents, latents, timestep, text, torch.tensor([1]))
    output = model(*arguments, return_logits=True)
    assert list(output) == ["prediction", "condition", "logits"]
    assert output[0] is output["prediction"] is output["sample"] is output.prediction
    assert output[-1] is output.logits
    as_tuple = model(*arguments, return_logits=True, return_dict=False)
    assert type(as_tuple) is tuple
    assert all(torch.equal(own, other) for own, other in zip(as_tuple, output.to_tuple(), strict=True))
    leaves, spec = tree_flatten(output)
    assert len(leaves) == 3
    rebuilt = tree_unflatten([leaf + 1 for leaf in leaves], spec)
    assert type(rebuilt) is MADFormerOutput
    assert torch.equal(rebuilt.logits, output.logits + 1)
    assert rebuilt.clean is None
