"""What a MADFormer is: its geometry, its streams, and which quirks of the released code it keeps.

A configuration is a frozen dataclass that round-trips through JSON. Presets are functions that return one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from madformer.config_parts import TextConfig, UNetConfig
from madformer.objects import check_types, from_object, parse_object, read_object, require

Context = Literal["clean+condition", "clean", "condition", "noise"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]
BlockOrder = Literal["raster", "spiral", "random"]
TimeConditioning = Literal["unet", "adaln", "unet+adaln"]

REGISTERED = "_registered"
"""Names, in ``config.json``, of the values there that are no fields; see :meth:`MADFormerConfig.register`."""

FOREIGN = ("auto_map", "quantization_config")
"""Values that diffusers puts there without saying so."""

MAX_TOKENS = 2**24
"""Of an image. Their places alone fill gigabytes."""

_MOST = {
    "hidden_size": 2**17,
    "num_layers": 1024,
    "num_heads": 2**16,
    "intermediate_size": 2**20,
    "num_blocks": MAX_TOKENS,
    "block_size": MAX_TOKENS,
    "rope_base": 2**31 - 1,
    "latent_channels": 2**16,
    "patch_size": 1024,
    "num_classes": 2**24,
}


@dataclass(frozen=True)
class MADFormerConfig(Mapping[str, Any]):
    """Geometry of the paper's two axes, the ablation switches, and the quirk fields.

    The defaults are the paper's FFHQ-1024 model. The last group of fields chooses between what the paper
    describes (the defaults) and what the released code does; ``docs/faithfulness.md`` tells each one's story.

    It is a mapping, too, of what ``config.json`` holds, as diffusers' configurations are: ``config["hidden_size"]``.
    """

    _class_name: ClassVar[str] = "MADFormer"

    hidden_size: int = 1152  # width of the Transformer; a multiple of four times num_heads
    num_layers: int = 28  # layers of the Transformer, N: autoregressive ones, then diffusion layers
    num_heads: int = 18  # heads of its attention
    intermediate_size: int = 4096  # width of its MLPs
    norm_eps: float = 1e-5  # added to the mean square that a norm divides by
    qk_norm: bool = True  # normalise queries and keys: steadier training
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # kind of its MLPs
    mlp_bias: bool = False  # give them biases

    # the two axes: how many blocks (M), and how many of the layers are diffusion layers (D)

    num_blocks: int = 16  # blocks of an image, M, drawn one after the other: 1 is plain diffusion
    block_size: int = 256  # tokens of a block, which are denoised together
    diffusion_layers: int = 14  # layers that run in every denoising step, D; the others run once a block
    # numbers that diffusion_layers may be set to after training, with commas: every batch draws one of them
    elastic_diffusion_layers: tuple[int, ...] = ()

    block_shape: tuple[int, ...] = ()  # rows,columns of tokens in a block; none: a square
    block_grid: tuple[int, ...] = ()  # rows,columns of blocks in the image; none: a square
    block_order: BlockOrder = "raster"  # order in which blocks are drawn
    rope_base: int = 0  # base of the image's rotation; 0: the released code's, which grows with the image

    latent_channels: int = 4  # channels of the autoencoder's latents
    # makes tokens of latents; none: linear layers on patches
    unet: UNetConfig | None = field(default_factory=UNetConfig)
    patch_size: int = 2  # latents along a side of such a patch; with a U-Net it says nothing

    text: TextConfig | None = None  # text before the image; none: no text
    num_classes: int = 0  # classes that the model is told; 0: none
    null_class: bool = True  # have a class for no class, which guidance leads away from
    # who is told the timestep: the U-Net, the diffusion layers (AdaLN), both
    time_conditioning: TimeConditioning = "unet"

    # the paper's ablations

    context: Context = "clean+condition"  # what a block is drawn from: earlier blocks, what layers make of them, both
    cross_block_attention: bool = True  # let diffusion layers attend to earlier blocks
    shared_towers: bool = False  # pass the clean and the noisy stream through the same weights
    # what the network predicts: the noise, the image, their mix, or the velocity of flow matching (noise less image)
    prediction_type: PredictionType = "epsilon"

    # quirks of the released code, which compat/ sets: the paper's way is the default, and each field is read where the
    # number is computed (CONTRIBUTING.md, "Add a quirk")

    rope_pairing: Literal["axial", "released"] = "axial"  # quirk: channels that a rotation pairs: an axis has its half
    clean_timestep: Literal["zero", "noisy"] = "zero"  # quirk: the timestep that clean blocks are embedded at
    # quirk: what the hidden loss decodes: the condition that autoregressive layers predict, or with noise added
    hidden_loss_input: Literal["condition", "condition+noisy"] = "condition"
    # quirk: the block whose U-Net skips that decoding reads: the one before, or the very one that it is compared with
    hidden_loss_skips: Literal["shifted", "same_block"] = "shifted"
    square_blocks: bool = True  # quirk: blocks are squares; without, tokens are numbered over the image

    def __post_init__(self) -> None:
        check_types(self, most=_MOST)
        for own in dataclasses.fields(self):
            value, low = getattr(self, own.name), 0 if own.name in ("num_classes", "rope_base") else 1
            if own.type == "int":
                require(value >= low, f"{own.name}={value!r} must be a whole number from {low}")
        require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
        self._check_transformer()
        self._check_blocks()
        self._check_conditioning()
        self._check_elastic()

    def _check_transformer(self) -> None:
        hidden, heads, layers = self.hidden_size, self.num_heads, self.num_layers
        require(hidden % heads == 0, f"hidden_size={hidden} must be a multiple of num_heads={heads}")
        given = f"hidden_size={hidden} / num_heads={heads} gives heads of {self.head_dim}"
        require(self.head_dim % 4 == 0, f"{given}; two-dimensional RoPE needs a multiple of 4")
        split = self.diffusion_layers
        require(split <= layers, f"diffusion_layers={split} must be from 1 to num_layers={layers}")

    def _check_blocks(self) -> None:
        for name, total in (("block_shape", "block_size"), ("block_grid", "num_blocks")):
            shape, count = getattr(self, name), getattr(self, total)
            if not shape:
                fits = math.isqrt(count) ** 2 == count
                require(fits, f"{total}={count} must be a square number where {name} names no rows and columns")
                continue
            whole = isinstance(shape, tuple) and all(isinstance(side, int) and side >= 1 for side in shape)
            fits = whole and len(shape) == 2 and math.prod(shape) == count
            require(fits, f"{name}={shape} must be rows and columns of {total}={count}")
        fits, blocks = self.num_blocks * self.block_size <= MAX_TOKENS, f"num_blocks={self.num_blocks}"
        require(fits, f"{blocks} of block_size={self.block_size} must be at most {MAX_TOKENS} tokens")
        why = "is not possible: square_blocks=False is for squares in raster order"
        for name in ("block_shape", "block_grid", "block_order"):
            value = getattr(self, name)
            require(self.square_blocks or value in ((), "raster"), f"{name}={value!r} {why}")
        shared, why = self.shared_towers, f"context={self.context!r} has none"
        require(not shared or self.has_clean_stream, f"shared_towers=True needs a clean stream to share with; {why}")

    def _check_conditioning(self) -> None:
        told, classes = f"time_conditioning={self.time_conditioning!r}", self.num_classes
        fits = self.unet is not None or self.time_conditioning == "adaln"
        require(fits, f"{told} needs a U-Net, and unet=None; there is 'adaln'")
        require(classes == 0 or self.modulated, f"num_classes={classes} needs AdaLN to tell the layers, and {told}")

    def _check_elastic(self) -> None:
        elastic, split = self.elastic_diffusion_layers, self.diffusion_layers
        if not elastic:
            return
        fits = split in elastic and all(1 <= number <= self.num_layers for number in elastic)
        limits = f"from 1 to num_layers={self.num_layers}, and diffusion_layers={split} among them"
        require(fits, f"elastic_diffusion_layers={elastic} must be {limits}")
        for fits, why in (
            (self.has_condition, f"context={self.context!r} has no condition to begin at another layer"),
            (self.cross_block_attention, "cross_block_attention=False ends the clean stream at the split"),
            (not self.modulated, f"time_conditioning={self.time_conditioning!r} tells the time to some layers alone"),
        ):
            require(fits, f"elastic_diffusion_layers={elastic} is not possible: {why}")

    @property
    def modulated(self) -> bool:
        """Whether the noise stream's diffusion layers have AdaLN."""
        return "adaln" in self.time_conditioning

    @property
    def time_widths(self) -> tuple[int, int, int]:
        """Numbers that the time is embedded in for the U-Net's halves and for AdaLN."""
        in_unet = self.unet.time_embed_dim if self.unet is not None and "unet" in self.time_conditioning else 0
        return in_unet, in_unet, self.hidden_size if self.modulated else 0

    @property
    def told_widths(self) -> tuple[int, int, int]:
        """The same with what each half's residual blocks project of it, which sampling tabulates for every step."""
        down, up, modulation = self.time_widths
        if self.unet is None or not down:
            return down, up, modulation
        in_down, in_up = self.unet.time_channels
        return down + in_down, up + in_up, modulation

    @property
    def can_be_guided(self) -> bool:
        """Whether there is a condition to leave out."""
        return self.text is not None or (self.num_classes > 0 and self.null_class)

    @property
    def downscale(self) -> int:
        """Latents along one side of a token."""
        return self.patch_size if self.unet is None else self.unet.downscale

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ar_layers(self) -> int:
        """``N - D``: layers that run once per block."""
        return self.num_layers - self.diffusion_layers

    @property
    def latents_per_block(self) -> int:
        """Latent positions of one block."""
        return self.block_size * self.downscale**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks in the image."""
        return _rows_and_columns(self.block_grid, self.num_blocks)

    @property
    def block_tokens(self) -> tuple[int, int]:
        """Rows and columns of tokens in a block."""
        return _rows_and_columns(self.block_shape, self.block_size)

    @property
    def block_latents(self) -> tuple[int, int]:
        """Rows and columns of latents in a block."""
        rows, columns = self.block_tokens
        return rows * self.downscale, columns * self.downscale

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in the image."""
        return self.grid[0] * self.block_tokens[0], self.grid[1] * self.block_tokens[1]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the image's latents."""
        rows, columns = self.token_grid
        return self.latent_channels, rows * self.downscale, columns * self.downscale

    def check_latents(self, shape: Sequence[int], what: str) -> None:
        """Raises ``ValueError`` where latents are not those that a model takes; ``what`` names them in the message."""
        if tuple(shape) != self.latent_shape:
            given, taken = (" x ".join(map(str, sizes)) for sizes in (shape, self.latent_shape))
            raise ValueError(
                f"{what}: latents are {given}, the model takes {taken} (latent_channels; num_blocks, block_size, unet)"
            )

    def at_grid(self, rows: int, columns: int) -> MADFormerConfig:
        """The same model for an image of more or fewer blocks: positions beyond those of training are extrapolated.

        Raises:
            ValueError: a model that knows no other size, in one line why.
        """
        if (rows, columns) == self.grid:
            return self
        refusal = f"an image of {rows} x {columns} blocks is not possible"
        require(rows >= 1 and columns >= 1, f"{refusal}: it has none")
        require(self.square_blocks, f"{refusal}: square_blocks=False numbers tokens over the image that it trained on")
        fits = rows * columns * self.block_size <= MAX_TOKENS
        require(fits, f"{refusal}: with {self.block_size} tokens a block it has more than at most {MAX_TOKENS} tokens")
        require(self.num_blocks > 1, f"{refusal}: the model was trained on a single block, and goes on from none")
        base = rope_base(self)
        return self.replace(num_blocks=rows * columns, block_grid=(rows, columns), rope_base=base)

    @property
    def text_length(self) -> int:
        """Tokens before the image."""
        return 0 if self.text is None else self.text.length

    @property
    def has_clean_stream(self) -> bool:
        return self.context in ("clean+condition", "clean")

    @property
    def has_condition(self) -> bool:
        """Whether the noise stream passes the autoregressive layers."""
        return self.context in ("clean+condition", "condition")

    @property
    def clean_layers(self) -> int:
        """How many layers the noise stream reads the clean one in: later ones need not run it."""
        if not self.has_clean_stream:
            return 0
        if self.cross_block_attention:
            return self.num_layers
        return self.ar_layers if self.has_condition else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __getitem__(self, name: str) -> Any:
        return self._items()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items())

    def __len__(self) -> int:
        return len(self._items())

    def items(self) -> ItemsView[str, Any]:
        return self._items().items()  # The inherited one makes them all for each of them.

    def __getattr__(self, name: str) -> Any:
        registered = self.__dict__.get("_values", {})
        if name in registered:
            return registered[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _items(self) -> dict[str, Any]:
        marked = [name for name in self.registered if name not in FOREIGN]
        mark = {REGISTERED: marked} if marked else {}
        return {"_class_name": self._class_name, **mark, **self.to_dict(), **self.registered}

    @property
    def registered(self) -> dict[str, Any]:
        """What :meth:`register` has put beside the fields."""
        return dict(self.__dict__.get("_values", {}))

    def register(self, **values: Any) -> MADFormerConfig:
        """A copy with fields changed and with other values put beside them.

        The latter do not change the model, and two configurations that differ in them alone are equal. diffusers
        keeps notes there, such as the decay of an average or the name that a model was loaded by.
        """
        names = {own.name for own in dataclasses.fields(self)}
        changes = {name: value for name, value in values.items() if name in names}
        notes = {name: value for name, value in values.items() if name not in {*names, "_class_name", REGISTERED}}
        result = self.from_dict({**self.to_dict(), **changes}) if changes else copy.copy(self)
        object.__setattr__(result, "_values", {**self.registered, **notes})
        return result

    def changes(self) -> dict[str, Any]:
        """What of :meth:`to_dict` is not the default: it stays what it is when there are new fields."""
        defaults = type(self)().to_dict()
        return {name: value for name, value in self.to_dict().items() if value != defaults[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MADFormerConfig:
        """Build from :meth:`to_dict`'s output. Keys that start with ``_`` (class and version marks) are ignored.

        Raises:
            ValueError: a key that is no field, or an impossible geometry; the message names the fields.
        """
        require(isinstance(values, Mapping), f"a MADFormer configuration is an object with fields, not {values!r}")
        marked = values.get(REGISTERED)
        names = (*FOREIGN, *(marked if isinstance(marked, list) else ()))
        notes = {name: values[name] for name in names if name in values}
        values = {key: value for key, value in values.items() if not key.startswith("_") and key not in notes}
        config = from_object(cls, values)
        return config.register(**notes) if notes else config

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MADFormerConfig:
        """Inverse of :meth:`to_json`; raises ``ValueError`` for text that is no such JSON."""
        return cls.from_dict(parse_object(text))

    @classmethod
    def from_file(cls, path: str | Path) -> MADFormerConfig:
        """Read ``config.json``; the error message names the file."""
        values = read_object(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check_split(self, diffusion_layers: int) -> None:
        """Raises ``ValueError`` for a number of diffusion layers that the model was not trained for."""
        choices = {self.diffusion_layers, *self.elastic_diffusion_layers}
        if diffusion_layers not in choices:
            listed = ", ".join(map(str, sorted(choices)))
            raise ValueError(f"diffusion_layers={diffusion_layers}: this model was trained for {listed}")

    def replace(self, **changes: Any) -> MADFormerConfig:
        """A copy with some fields changed, validated again."""
        result = dataclasses.replace(self, **changes)
        return result.register(**self.registered) if self.registered else result


def rope_base(config: MADFormerConfig) -> int:
    """Base of the image's rotation: as configured, or in proportion to the longer side in tokens, as released."""
    return config.rope_base or (int(8 * max(config.token_grid) / math.pi) // 100 + 1) * 100


def _rows_and_columns(shape: tuple[int, ...], count: int) -> tuple[int, int]:
    rows, columns = shape or (math.isqrt(count),) * 2
    return rows, columns


def ffhq1024() -> MADFormerConfig:
    """The paper's FFHQ-1024 model: 1.3 B parameters, 16 blocks of 256 tokens, half of the layers diffusion."""
    return MADFormerConfig()


def imagenet256() -> MADFormerConfig:
    """The paper's ImageNet-256 model: 4 blocks of 64 tokens, and the class as two tokens of Llama 3 before them."""
    text = TextConfig(vocab_size=128_256, length=2, pad_token_id=128_004)
    return MADFormerConfig(num_blocks=4, block_size=64, text=text)


def emoji64() -> MADFormerConfig:
    """Emoji of 64 x 64 pixels (16 x 16 latents) from captions in bytes and Unicode's nine groups.

    Small enough to train on a laptop's processor.
    """
    return MADFormerConfig(
        hidden_size=192,
        num_layers=6,
        num_heads=3,
        intermediate_size=384,
        num_blocks=4,
        block_size=16,
        diffusion_layers=3,
        unet=UNetConfig(block_out_channels=(48, 96), layers_per_block=(1, 1)),
        text=TextConfig(vocab_size=257, length=48, pad_token_id=256),
        num_classes=9,
        time_conditioning="unet+adaln",
    )


def tiny() -> MADFormerConfig:
    """The smallest model with every part in it, for tests and first steps."""
    return MADFormerConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=2,
        intermediate_size=96,
        num_blocks=4,
        block_size=4,
        diffusion_layers=2,
        unet=UNetConfig(block_out_channels=(16, 32), num_heads=4, time_embed_dim=32),
    )


PRESETS: dict[str, Callable[[], MADFormerConfig]] = {
    preset.__name__: preset for preset in (ffhq1024, imagenet256, emoji64, tiny)
}


def preset(name: str) -> MADFormerConfig:
    """The configuration of that name; raises ``ValueError`` that lists the presets."""
    require(name in PRESETS, f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
