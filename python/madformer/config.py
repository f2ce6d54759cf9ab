"""What a MADFormer is: its geometry, its streams, and which quirks of the released code it keeps.

A configuration is a frozen dataclass that round-trips through JSON. Presets are functions that return one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from madformer.objects import check_types, from_object, parse_object, read_object

Context = Literal["clean+condition", "clean", "condition", "noise"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
BlockOrder = Literal["raster", "spiral", "random"]
TimeConditioning = Literal["unet", "adaln", "unet+adaln"]

REGISTERED = "_registered"
"""Names, in ``config.json``, of the values there that are no fields; see :meth:`MADFormerConfig.register`."""

FOREIGN = ("auto_map", "quantization_config")
"""Values that diffusers puts there without saying so."""


MAX_TOKENS = 2**24
"""Of an image. Their places alone fill gigabytes."""

MAX_LEVELS = 10
# far beyond any model: what is more is a slip, and fails at a place that does not say so
_MOST_OF_UNET = {
    "block_out_channels": 2**16,
    "layers_per_block": 256,
    "num_heads": 2**16,
    "norm_groups": 2**16,
    "time_embed_dim": 2**16,
}
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
class UNetConfig:
    """The convolutional encoder and decoder around the Transformer, built of diffusers' blocks.

    Each level but the last halves the resolution, so a block of ``L`` latents becomes
    ``L / 4 ** (levels - 1)`` tokens.
    """

    block_out_channels: tuple[int, ...] = (512, 1024)
    layers_per_block: tuple[int, ...] = (2, 2)
    attention: tuple[bool, ...] = (False, True)
    num_heads: int = 8
    norm_groups: int = 8
    time_embed_dim: int = 128

    def __post_init__(self) -> None:
        check_types(self, "unet.", most=_MOST_OF_UNET)
        levels = len(self.block_out_channels)
        _require(
            1 <= levels <= MAX_LEVELS,
            f"unet.block_out_channels={self.block_out_channels} must name from one level to {MAX_LEVELS}",
        )
        for name in ("layers_per_block", "attention"):
            _require(
                len(getattr(self, name)) == levels,
                f"unet.{name}={getattr(self, name)} must have one entry for each of the {levels} levels of "
                f"unet.block_out_channels={self.block_out_channels}",
            )
        _require(min(self.layers_per_block) >= 1, f"unet.layers_per_block={self.layers_per_block} must be positive")
        for name in ("num_heads", "norm_groups", "time_embed_dim"):
            _require(getattr(self, name) >= 1, f"unet.{name}={getattr(self, name)} must be positive")
        for channels, attention in zip(self.block_out_channels, self.attention, strict=True):
            _require(
                channels >= 1 and channels % self.norm_groups == 0,
                f"unet.block_out_channels={self.block_out_channels} must be multiples of "
                f"unet.norm_groups={self.norm_groups}",
            )
            _require(
                not attention or channels % self.num_heads == 0,
                f"unet.block_out_channels={self.block_out_channels} must be multiples of "
                f"unet.num_heads={self.num_heads} where unet.attention is on",
            )

    @property
    def downscale(self) -> int:
        """Latents along one side of a token."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig:
    """Text before the image: a causal stream with a tower of its own, which every image token attends to.

    Attributes:
        vocab_size: of the tokenizer.
        length: tokens of every text. Shorter ones are padded; padding is attended to as any other token is.
        pad_token_id: its embedding gets no gradient; None for no such token.
        rope_theta: base of the one-dimensional rotation.
    """

    vocab_size: int
    length: int
    pad_token_id: int | None = None
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        check_types(self, "text.", most={"vocab_size": 2**24, "length": 2**20})
        for name in ("vocab_size", "length"):
            _require(getattr(self, name) >= 1, f"text.{name}={getattr(self, name)} must be positive")
        _require(self.rope_theta > 0, f"text.rope_theta={self.rope_theta} must be positive")
        _require(
            self.pad_token_id is None or 0 <= self.pad_token_id < self.vocab_size,
            f"text.pad_token_id={self.pad_token_id} must be below text.vocab_size={self.vocab_size}",
        )


@dataclass(frozen=True)
class MADFormerConfig(Mapping[str, Any]):
    """Geometry of the paper's two axes, the ablation switches, and the quirk fields.

    The defaults are the paper's FFHQ-1024 model. The last group of fields chooses between what the paper
    describes (the defaults) and what the released code does; ``docs/faithfulness.md`` tells each one's story.

    It is a mapping, too, of what ``config.json`` holds, as diffusers' configurations are: ``config["hidden_size"]``.
    """

    _class_name: ClassVar[str] = "MADFormer"

    # Transformer
    hidden_size: int = 1152
    num_layers: int = 28
    num_heads: int = 18
    intermediate_size: int = 4096
    norm_eps: float = 1e-5
    qk_norm: bool = True
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_bias: bool = False

    # the two axes: how many blocks (M), and how many of the layers are diffusion layers (D)
    num_blocks: int = 16
    block_size: int = 256
    diffusion_layers: int = 14
    # what diffusion_layers may be set to afterwards: training drew each batch's number from these
    elastic_diffusion_layers: tuple[int, ...] = ()

    # rows and columns of a block in tokens and of the image in blocks, empty for squares; and the order of the blocks
    block_shape: tuple[int, ...] = ()
    block_grid: tuple[int, ...] = ()
    block_order: BlockOrder = "raster"
    # base of the image's rotation: 0 for the released code's, which grows with the image
    rope_base: int = 0

    # latents, and what makes tokens of them: a U-Net around the Transformer, or, for None, linear layers on patches
    latent_channels: int = 4
    unet: UNetConfig | None = field(default_factory=UNetConfig)
    patch_size: int = 2

    # what the image is conditioned on: text before it, a class, and where the diffusion layers learn of time and class
    text: TextConfig | None = None
    num_classes: int = 0
    null_class: bool = True
    time_conditioning: TimeConditioning = "unet"

    # the paper's ablations
    context: Context = "clean+condition"
    cross_block_attention: bool = True
    shared_towers: bool = False
    prediction_type: PredictionType = "epsilon"

    # quirks of the released code, which compat/ sets: the paper's way is the default, and each field is read where the
    # number is computed (CONTRIBUTING.md, "Add a quirk")
    rope_pairing: Literal["axial", "released"] = "axial"
    clean_timestep: Literal["zero", "noisy"] = "zero"
    hidden_loss_input: Literal["condition", "condition+noisy"] = "condition"
    hidden_loss_skips: Literal["shifted", "same_block"] = "shifted"
    square_blocks: bool = True

    def __post_init__(self) -> None:
        check_types(self, most=_MOST)
        for own in dataclasses.fields(self):
            value, low = getattr(self, own.name), 0 if own.name in ("num_classes", "rope_base") else 1
            if own.type == "int":
                _require(value >= low, f"{own.name}={value!r} must be a whole number from {low}")
        _require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
        self._check_transformer()
        self._check_blocks()
        self._check_conditioning()
        self._check_elastic()

    def _check_transformer(self) -> None:
        _require(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}",
        )
        _require(
            self.head_dim % 4 == 0,
            f"hidden_size={self.hidden_size} / num_heads={self.num_heads} gives heads of {self.head_dim}; "
            "two-dimensional RoPE needs a multiple of 4",
        )
        _require(
            self.diffusion_layers <= self.num_layers,
            f"diffusion_layers={self.diffusion_layers} must be from 1 to num_layers={self.num_layers}",
        )

    def _check_blocks(self) -> None:
        for name, total in (("block_shape", "block_size"), ("block_grid", "num_blocks")):
            shape, count = getattr(self, name), getattr(self, total)
            if not shape:
                fits = math.isqrt(count) ** 2 == count
                _require(fits, f"{total}={count} must be a square number where {name} names no rows and columns")
                continue
            whole = isinstance(shape, tuple) and all(isinstance(side, int) and side >= 1 for side in shape)
            fits = whole and len(shape) == 2 and math.prod(shape) == count
            _require(fits, f"{name}={shape} must be rows and columns of {total}={count}")
        _require(
            self.num_blocks * self.block_size <= MAX_TOKENS,
            f"num_blocks={self.num_blocks} of block_size={self.block_size} must be at most {MAX_TOKENS} tokens",
        )
        for name in ("block_shape", "block_grid", "block_order"):
            _require(
                self.square_blocks or getattr(self, name) in ((), "raster"),
                f"{name}={getattr(self, name)!r} is not possible: square_blocks=False is for squares in raster order",
            )
        _require(
            not self.shared_towers or self.has_clean_stream,
            f"shared_towers=True needs a clean stream to share with; context={self.context!r} has none",
        )

    def _check_conditioning(self) -> None:
        _require(
            self.unet is not None or self.time_conditioning == "adaln",
            f"time_conditioning={self.time_conditioning!r} needs a U-Net, and unet=None; there is 'adaln'",
        )
        _require(
            self.num_classes == 0 or self.modulated,
            f"num_classes={self.num_classes} needs AdaLN to tell the layers, and "
            f"time_conditioning={self.time_conditioning!r}",
        )

    def _check_elastic(self) -> None:
        elastic = self.elastic_diffusion_layers
        if not elastic:
            return
        _require(
            self.diffusion_layers in elastic and all(1 <= number <= self.num_layers for number in elastic),
            f"elastic_diffusion_layers={elastic} must be from 1 to num_layers={self.num_layers}, and "
            f"diffusion_layers={self.diffusion_layers} among them",
        )
        for fits, why in (
            (self.has_condition, f"context={self.context!r} has no condition to begin at another layer"),
            (self.cross_block_attention, "cross_block_attention=False ends the clean stream at the split"),
            (not self.modulated, f"time_conditioning={self.time_conditioning!r} tells the time to some layers alone"),
        ):
            _require(fits, f"elastic_diffusion_layers={elastic} is not possible: {why}")

    @property
    def modulated(self) -> bool:
        """Whether the noise stream's diffusion layers have AdaLN."""
        return "adaln" in self.time_conditioning

    @property
    def time_widths(self) -> tuple[int, int, int]:
        """Numbers that tell the time to the U-Net's halves and to AdaLN."""
        in_unet = self.unet.time_embed_dim if self.unet is not None and "unet" in self.time_conditioning else 0
        return in_unet, in_unet, self.hidden_size if self.modulated else 0

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

    def at_grid(self, rows: int, columns: int) -> MADFormerConfig:
        """The same model for an image of more or fewer blocks: positions beyond those of training are extrapolated.

        Raises:
            ValueError: a model that knows no other size, in one line why.
        """
        if (rows, columns) == self.grid:
            return self
        refusal = f"an image of {rows} x {columns} blocks is not possible"
        _require(rows >= 1 and columns >= 1, f"{refusal}: it has none")
        _require(self.square_blocks, f"{refusal}: square_blocks=False numbers tokens over the image that it trained on")
        fits = rows * columns * self.block_size <= MAX_TOKENS
        _require(fits, f"{refusal}: with {self.block_size} tokens a block it has more than at most {MAX_TOKENS} tokens")
        _require(self.num_blocks > 1, f"{refusal}: the model was trained on a single block, and goes on from none")
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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def __getitem__(self, name: str) -> Any:
        return self._items()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items())

    def __len__(self) -> int:
        return len(self._items())

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
        _require(isinstance(values, Mapping), f"a MADFormer configuration is an object with fields, not {values!r}")
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


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
    _require(name in PRESETS, f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
