"""The network: what depends on what, the native defaults against the quirks, copies, casts, compilation, storage."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from madformer.config import MADFormerConfig, TextConfig, UNetConfig, preset, tiny
from madformer.kernels.qk_norm_rope.reference import apply_rope
from madformer.model import MADFormer
from madformer.model.blocks import from_blocks, from_maps, to_blocks, to_maps
from madformer.model.rope import rope_tables, token_positions
from madformer.model.unet import TimestepEmbedding, skip_connections
from tests.helpers.engine_cases import FLAT
from tests.helpers.testing import perturb, relative_error

TEXT = TextConfig(vocab_size=11, length=5)
MODELS = {
    "both": FLAT,
    "clean only": FLAT.replace(context="clean"),
    "condition only": FLAT.replace(context="condition"),
    "noisy blocks only": FLAT.replace(context="noise"),
    "block-local": FLAT.replace(cross_block_attention=False),
    "shared towers": FLAT.replace(shared_towers=True),
    "one block": FLAT.replace(num_blocks=1),
    "text": FLAT.replace(text=TEXT),
    "text, condition only": FLAT.replace(text=TEXT, context="condition"),
    "text, block-local": FLAT.replace(text=TEXT, cross_block_attention=False),
    "text, shared towers": FLAT.replace(text=TEXT, shared_towers=True),
    "AdaLN and U-Net": FLAT.replace(time_conditioning="unet+adaln", num_classes=7),
    "AdaLN alone": FLAT.replace(time_conditioning="adaln"),
    "patches": tiny().replace(unet=None, time_conditioning="adaln", num_classes=7),
    "patches, GELU, text": tiny().replace(
        unet=None, time_conditioning="adaln", num_classes=7, mlp="gelu", mlp_bias=True, text=TEXT
    ),
    "three levels": tiny().replace(
        block_size=1,
        unet=UNetConfig((16, 16, 32), (1, 2, 1), (False, True, True), num_heads=4, time_embed_dim=32),
    ),
}


def make_model(config: MADFormerConfig) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(config))
    assert isinstance(model, MADFormer)
    return model


def draw(config: MADFormerConfig, batch: int = 2) -> tuple[Any, ...]:
    """Clean latents, noisy latents, timesteps, texts and labels, the last two for a model that takes them."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.num_blocks, config.latents_per_block, config.latent_channels)
    clean, noisy = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    timestep = torch.randint(0, 1000, shape[:2], generator=generator)
    text = labels = None
    if config.text is not None:
        text = torch.randint(0, config.text.vocab_size, (batch, config.text.length), generator=generator)
    if config.num_classes:
        labels = torch.randint(0, config.num_classes, (batch,), generator=generator)
    return clean, noisy, timestep, text, labels


# Who sees what


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize(
    "name",
    ["both", "clean only", "condition only", "block-local", "shared towers", "noisy blocks only", "text", "patches"],
)
def test_a_block_is_predicted_from_its_past(name: str, block: int) -> None:
    """Changing a block changes no earlier prediction; changing it as context changes the next."""
    config = MODELS[name]
    model, (clean, noisy, *rest) = make_model(config), draw(config)
    before = model(clean, noisy, *rest)
    changed = clean.clone()
    changed[:, block] += 1
    after = model(changed, noisy, *rest)
    assert torch.equal(after.prediction[:, : block + 1], before.prediction[:, : block + 1])
    if before.condition is not None:
        assert torch.equal(after.condition[:, : block + 1], before.condition[:, : block + 1])
    if block < 3 and name != "noisy blocks only":
        assert not torch.allclose(after.prediction[:, block + 1], before.prediction[:, block + 1])

    noisier = noisy.clone()
    noisier[:, block] += 1
    prediction = model(clean, noisier, *rest).prediction
    moved = (prediction - before.prediction).abs().amax((0, 2, 3)) > 1e-6
    reach = 4 if not config.has_clean_stream else block + 1
    assert moved.tolist() == [block <= i < reach for i in range(4)]


@pytest.mark.parametrize("name", ["both", "text", "patches"])
def test_images_of_a_batch_do_not_meet(name: str) -> None:
    model, arguments = make_model(MODELS[name]), draw(MODELS[name])
    together = model(*arguments).prediction
    alone = model(*(None if argument is None else argument[1:] for argument in arguments)).prediction
    assert relative_error(together[1:], alone) < 1e-5


@pytest.mark.parametrize("name", ["text", "text, condition only", "text, block-local", "text, shared towers"])
def test_the_image_reads_the_text_and_the_text_its_own_past(name: str) -> None:
    config = MODELS[name]
    model, (clean, noisy, timestep, text, _) = make_model(config), draw(config)
    before = model(clean, noisy, timestep, text, return_logits=True)
    assert before.logits.shape == (*text.shape, TEXT.vocab_size)
    changed = text.clone()
    changed[:, 3] = (changed[:, 3] + 1) % TEXT.vocab_size
    after = model(clean + 1, noisy, timestep, changed, return_logits=True)
    assert torch.equal(after.logits[:, :3], before.logits[:, :3])
    assert not torch.allclose(after.logits[:, 4], before.logits[:, 4])
    moved = model(clean, noisy, timestep, changed).prediction - before.prediction
    assert (moved.abs().amax((2, 3)) > 1e-6).all()


@pytest.mark.parametrize("name", ["AdaLN and U-Net", "patches"])
def test_the_class_reaches_every_block_and_may_be_left_out(name: str) -> None:
    model, (clean, noisy, timestep, _, labels) = make_model(MODELS[name]), draw(MODELS[name])
    before = model(clean, noisy, timestep, labels_B=labels).prediction
    other = model(clean, noisy, timestep, labels_B=(labels + 1) % 7).prediction
    assert ((other - before).abs().amax((2, 3)) > 1e-6).all()
    dropped = model(clean, noisy, timestep, labels_B=torch.tensor([-1, -1])).prediction
    assert torch.equal(dropped, model(clean, noisy, timestep, labels_B=torch.tensor([7, 7])).prediction)
    assert not torch.allclose(dropped, before)


@pytest.mark.parametrize("name", ["AdaLN alone", "patches"])
def test_adaln_begins_as_nothing(name: str) -> None:
    """Freshly made, neither time nor class changes a block: gates are closed, or the decoder says zero."""
    config = MODELS[name]
    model = MADFormer(config).eval()
    clean, noisy, timestep, *rest = draw(config)
    assert torch.equal(
        model(clean, noisy, timestep, *rest).prediction, model(clean, noisy, timestep // 2, *rest).prediction
    )


@pytest.mark.parametrize("split", [1, 3])
def test_an_elastic_model_is_at_each_split_a_model_of_it(split: int) -> None:
    """Of one pass, or for good; the weights are the same."""
    elastic = make_model(tiny().replace(elastic_diffusion_layers=(1, 2, 3)))
    fixed = make_model(tiny().replace(diffusion_layers=split))
    arguments = draw(tiny())
    expected = fixed(*arguments)
    for output in (elastic(*arguments, diffusion_layers=split), elastic.set_split(split)(*arguments)):
        assert torch.equal(output.prediction, expected.prediction)
        assert torch.equal(output.condition, expected.condition)
    with pytest.raises(ValueError, match="diffusion_layers=4: this model was trained for 1, 2, 3"):
        elastic.set_split(4)
    with pytest.raises(ValueError, match="diffusion_layers=1: this model was trained for 2"):
        make_model(tiny())(*arguments, diffusion_layers=1)


def test_texts_that_do_not_fit_are_refused() -> None:
    clean, noisy, timestep, text, _ = draw(MODELS["text"])
    for model, given in ((MODELS["text"], None), (MODELS["text"], text[:, 1:]), (MODELS["both"], text)):
        with pytest.raises(ValueError, match=r"this model takes texts of \d tokens, got \d"):
            make_model(model)(clean, noisy, timestep, given)
    for name, labels, message in (
        ("patches", None, "7 classes, and none"),
        ("both", text[:, 0], "0 classes, and some"),
    ):
        with pytest.raises(ValueError, match=f"this model has {message} were given"):
            make_model(MODELS[name])(clean, noisy, timestep, labels_B=labels)


def test_native_condition_knows_neither_the_noise_nor_its_own_block() -> None:
    """The released code adds the noisy embedding to it and lends it the target's own skips."""
    clean, noisy, timestep, *_ = draw(tiny())
    other = clean.clone()
    other[:, -1] += 1
    for quirks, leaks in (
        ({}, False),
        ({"hidden_loss_input": "condition+noisy"}, True),
        ({"hidden_loss_skips": "same_block"}, True),
    ):
        model = make_model(tiny().replace(**quirks))
        condition = model(clean, noisy, timestep).condition
        same = model(other, noisy + 1, timestep).condition
        assert torch.equal(condition, same) != leaks, quirks


def test_native_clean_blocks_have_no_timestep() -> None:
    """In the released code a clean block carries the timestep of the noise on its noisy twin."""
    for quirk, depends in (("zero", False), ("noisy", True)):
        model = make_model(tiny().replace(clean_timestep=quirk))
        clean, noisy, timestep, *_ = draw(tiny())
        other = timestep.clone()
        other[:, 0] = (other[:, 0] + 500) % 1000
        first, second = (model(clean, noisy, t).prediction[:, 1] for t in (timestep, other))
        assert torch.equal(first, second) != depends


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_trained(name: str) -> None:
    """No dead parameter: with all losses, each gets a gradient that is not zero."""
    config = MODELS[name]
    model, arguments = make_model(config), draw(config)
    output = model(*arguments, return_clean=config.has_clean_stream, return_logits=config.text is not None)
    outputs = (output.prediction, output.condition, output.clean, output.logits)
    sum(x.square().mean() for x in outputs if x is not None).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    if name == "one block":
        # nothing attends to the only clean block, and one noise block has nobody else to attend to
        assert all("clean" in parameter or "boi_skips" not in parameter for parameter in dead)
    elif name == "three levels":
        # one token a block: attention over a single pixel has nothing to choose between
        assert all(".to_q." in parameter or ".to_k." in parameter for parameter in dead)
    else:
        assert not dead


# Geometry


def test_parameter_counts_of_the_paper() -> None:
    """1.30 B with two towers."""
    with torch.device("meta"):
        model = MADFormer(preset("ffhq1024"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.30e9, rel=0.01)


def test_blocks_are_squares_in_raster_order() -> None:
    config = tiny().replace(num_blocks=9, block_size=1)
    image = torch.arange(2 * 3 * 6 * 6).view(2, 3, 6, 6)
    blocks = to_blocks(image, config)
    assert blocks.shape == (2, 9, 4, 3)
    assert torch.equal(blocks[1, 5, :, 2], image[1, 2, 2:4, 4:6].flatten())
    assert torch.equal(from_blocks(blocks, config), image)
    assert torch.equal(from_maps(to_maps(blocks), 9), blocks)
    assert torch.equal(to_maps(blocks)[9 + 5, 2], image[1, 2, 2:4, 4:6])


def test_token_positions_follow_the_blocks() -> None:
    config = tiny()
    rows, columns = token_positions(config)
    grid = torch.stack((rows, columns)).view(2, 4, 4)
    assert grid[:, 0].tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    assert grid[:, 2].tolist() == [[2, 2, 3, 3], [0, 1, 0, 1]]
    raster = token_positions(config.replace(square_blocks=False))
    assert raster[:, :5].tolist() == [[0, 0, 0, 0, 1], [0, 1, 2, 3, 0]]


@pytest.mark.parametrize("unet", [tiny().unet, MODELS["three levels"].unet, UNetConfig((32,), (3,), (True,))])
def test_skip_shapes(unet: UNetConfig) -> None:
    config = tiny().replace(unet=unet)
    model = MADFormer(config)
    x = torch.randn(1, config.latent_channels, *config.block_latents)
    _, skips = model.downsampler(x, torch.zeros(1, unet.time_embed_dim))
    levels, channels = zip(*skip_connections(config), strict=True)
    assert [skip.shape[1] for skip in skips] == list(channels)
    assert [skip.shape[2] for skip in skips] == [config.block_latents[0] // 2**level for level in levels]


# Rotary embedding


def test_axial_rope_is_a_rotation_that_sees_only_distance() -> None:
    """Norms are kept, and a score depends on the offset between two tokens alone; the released pairing's does not."""
    config = tiny().replace(block_size=64, num_blocks=1)
    cos, sin = rope_tables(config)
    q, k = torch.randn(2, config.head_dim, generator=torch.Generator().manual_seed(0)).split(1)
    spread = {}
    for pairing, axes in (("axial", 2), ("released", 1)):
        rotated_q, rotated_k = (apply_rope(x.expand(64, -1), cos, sin, axes=axes) for x in (q, k))
        scores = (rotated_q @ rotated_k.T).view(8, 8, 8, 8)
        same_offset = torch.stack([scores[row, col, row + 2, col + 1] for row in range(6) for col in range(7)])
        spread[pairing] = (same_offset.max() - same_offset.min()).item()
        if pairing == "axial":
            torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(64))
    assert spread["axial"] < 1e-4 < 1e-1 < spread["released"]


def test_rope_tables_stay_fp32_and_survive_meta() -> None:
    expected = rope_tables(tiny())[0]
    model = MADFormer(tiny())
    assert torch.equal(model.to(torch.bfloat16).rope.cos, expected)
    with torch.device("meta"):
        empty = MADFormer(tiny())
    assert torch.equal(empty.to_empty(device="cpu").rope.cos, expected)


def test_neighbouring_timesteps_differ_in_bf16() -> None:
    """As bf16 numbers 998 and 999 are one; the embedding keeps them apart, under autocast too."""
    embedding = TimestepEmbedding(32)
    exact = embedding(torch.tensor([998, 999]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(torch.tensor([998, 999])), exact)
    low = embedding.to(torch.bfloat16)(torch.tensor([998, 999]))
    assert low.dtype == torch.float32
    assert not torch.equal(low[0], low[1])


# Copies, casts, compilation


def test_deepcopy_shares_nothing() -> None:
    model, arguments = make_model(tiny()), draw(tiny())
    before = model(*arguments).prediction
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert torch.equal(model(*arguments).prediction, before)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    model, arguments = make_model(MODELS[name]), draw(MODELS[name])
    exact = model(*arguments).prediction
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(*arguments).prediction
    assert relative_error(prediction, exact) < 0.05
    prediction.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


ONE_LEVEL = tiny().replace(
    num_layers=2, diffusion_layers=1, unet=UNetConfig((16,), (1,), (True,), num_heads=4, time_embed_dim=32)
)


WHOLE = [pytest.param(MODELS[name], marks=pytest.mark.slow, id=name) for name in ("both", "condition only")]


@pytest.mark.parametrize("config", WHOLE)
def test_compile_without_gradients(config: MADFormerConfig) -> None:
    model, arguments = make_model(config), draw(config)
    traced = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(traced(*arguments).prediction, model(*arguments).prediction) < 1e-5


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        pytest.param(ONE_LEVEL, "eager", id="a U-Net of one level"),
        pytest.param(ONE_LEVEL, "aot_eager", id="a U-Net of one level, backward too", marks=pytest.mark.slow),
        *(pytest.param(*whole.values, "aot_eager", id=whole.id, marks=whole.marks) for whole in WHOLE),
    ],
)
def test_compile(config: MADFormerConfig, backend: str) -> None:
    """Traced whole, without a break; forward and backward as in eager.

    Gradients in float64: a traced graph may take sums apart that eager makes at once, and what cancels in them costs it
    digits. There it has them to spare, and what is traced wrong is off by far more.
    """
    model, arguments = make_model(config).double(), draw(config)
    traced = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    clean, noisy, *others = arguments
    for network in (model, traced):
        output = network(clean.double(), noisy.double(), *others)
        (output.prediction.square().mean() + output.condition.square().mean()).backward()
    for (parameter_name, eager), parameter in zip(model.named_parameters(), traced.parameters(), strict=True):
        assert (eager.grad is None) == (parameter.grad is None), parameter_name
        if eager.grad is not None:
            torch.testing.assert_close(parameter.grad, eager.grad, rtol=1e-9, atol=1e-12, msg=parameter_name)


# Storage


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, arguments = make_model(MODELS[name]), draw(MODELS[name])
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = MADFormer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert relative_error(loaded(*arguments).prediction, model(*arguments).prediction) < 1e-6


def test_stored_dtype_and_overrides(tmp_path: Path) -> None:
    model = make_model(tiny())
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert MADFormer.from_pretrained(tmp_path).dtype == torch.bfloat16
    loaded = MADFormer.from_pretrained(tmp_path, dtype=torch.float32, prediction_type="sample")
    assert (loaded.dtype, loaded.config.prediction_type) == (torch.float32, "sample")
    assert relative_error(loaded.boi, model.boi) < 0.005


def test_damaged_folders(tmp_path: Path) -> None:
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        MADFormer.from_pretrained(tmp_path)
    make_model(tiny()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit the configuration: .* of another shape"):
        MADFormer.from_pretrained(tmp_path, hidden_size=128)
    with pytest.raises(ValueError, match=r"\d+ tensors missing \(layers\.3\.towers\.clean"):
        MADFormer.from_pretrained(tmp_path, num_layers=4)
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or truncated"):
        MADFormer.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="holds no diffusion_pytorch_model"):
        MADFormer.from_pretrained(tmp_path)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make_model(tiny()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_configuration_field_is_read() -> None:
    """A field that changes nothing would be a switch wired to nothing: names, shapes or numbers must differ."""
    base = tiny().replace(block_size=16)
    changes = {
        "hidden_size": 128, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "norm_eps": 1e-2,
        "qk_norm": False, "mlp_bias": True, "num_blocks": 9, "block_size": 4, "diffusion_layers": 1,
        "latent_channels": 3, "unet": dataclasses.replace(base.unet, norm_groups=4), "context": "condition",
        "cross_block_attention": False, "shared_towers": True, "rope_pairing": "released",
        "clean_timestep": "noisy", "hidden_loss_input": "condition+noisy", "hidden_loss_skips": "same_block",
        "square_blocks": False, "text": TEXT, "mlp": "gelu", "time_conditioning": "unet+adaln",
        "block_shape": (2, 8), "block_grid": (1, 4), "block_order": "spiral", "rope_base": 7,
    }  # fmt: skip
    elsewhere = {"prediction_type", "patch_size", "num_classes", "null_class", "elastic_diffusion_layers"}
    assert changes.keys() | elsewhere == vars(base).keys()
    reference = make_model(base)
    for name, value in changes.items():
        config = base.replace(**{name: value})
        model = make_model(config)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        if shapes != {n: p.shape for n, p in reference.named_parameters()} or name in ("num_blocks", "block_size"):
            continue
        model.load_state_dict(reference.state_dict())
        ours, theirs = model(*draw(config)), reference(*draw(base))
        changed = [relative_error(getattr(ours, part), getattr(theirs, part)) for part in ("prediction", "condition")]
        assert max(changed) > 1e-5, name
        assert not any(map(math.isnan, changed))
