"""The parts of a model that have a configuration of their own: the U-Net around the Transformer, and the text."""

from __future__ import annotations

from dataclasses import dataclass

from madformer.objects import check_types, require

MAX_LEVELS = 10
# far beyond any model: what is more is a slip, and fails at a place that does not say so
_MOST_OF_UNET = {
    "block_out_channels": 2**16,
    "layers_per_block": 256,
    "num_heads": 2**16,
    "norm_groups": 2**16,
    "time_embed_dim": 2**16,
}


@dataclass(frozen=True)
class UNetConfig:
    """The convolutional encoder and decoder around the Transformer, built of diffusers' blocks.

    Each level but the last halves the resolution, so that 4 ** (levels - 1) latents become a token. A comment is a
    field's line of help on the command line, here and below.
    """

    block_out_channels: tuple[int, ...] = (512, 1024)  # channels of each level, outermost first
    layers_per_block: tuple[int, ...] = (2, 2)  # residual blocks of each level
    attention: tuple[bool, ...] = (False, True)  # whether a level has attention, which grows with its latents squared
    num_heads: int = 8  # of that attention; divides the channels of its levels
    norm_groups: int = 8  # of the group norms; divides the channels of every level
    time_embed_dim: int = 128  # numbers that tell the timestep

    def __post_init__(self) -> None:
        check_types(self, "unet.", most=_MOST_OF_UNET)
        levels, named = len(self.block_out_channels), f"unet.block_out_channels={self.block_out_channels}"
        require(1 <= levels <= MAX_LEVELS, f"{named} must name from one level to {MAX_LEVELS}")
        for name in ("layers_per_block", "attention"):
            given, each = getattr(self, name), f"one entry for each of the {levels} levels of {named}"
            require(len(given) == levels, f"unet.{name}={given} must have {each}")
        require(min(self.layers_per_block) >= 1, f"unet.layers_per_block={self.layers_per_block} must be positive")
        for name in ("num_heads", "norm_groups", "time_embed_dim"):
            require(getattr(self, name) >= 1, f"unet.{name}={getattr(self, name)} must be positive")
        for channels, attention in zip(self.block_out_channels, self.attention, strict=True):
            fits = channels >= 1 and channels % self.norm_groups == 0
            require(fits, f"{named} must be multiples of unet.norm_groups={self.norm_groups}")
            fits, heads = not attention or channels % self.num_heads == 0, f"unet.num_heads={self.num_heads}"
            require(fits, f"{named} must be multiples of {heads} where unet.attention is on")

    @property
    def downscale(self) -> int:
        """Latents along one side of a token."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def time_channels(self) -> tuple[int, int]:
        """Channels of all residual blocks of each half: to each of them a projection of the time is added."""
        levels = list(zip(self.block_out_channels, self.layers_per_block, strict=True))
        return sum(width * layers for width, layers in levels), sum(width * (layers + 1) for width, layers in levels)


@dataclass(frozen=True)
class TextConfig:
    """Text before the image: a causal stream with a tower of its own, which every image token attends to."""

    vocab_size: int  # tokens that the tokenizer knows
    length: int  # tokens of every text: shorter ones are padded, and padding is attended to as any other token is
    pad_token_id: int | None = None  # the token whose embedding gets no gradient; none for no such token
    rope_theta: float = 10_000.0  # base of the one-dimensional rotation; more for longer texts

    def __post_init__(self) -> None:
        check_types(self, "text.", most={"vocab_size": 2**24, "length": 2**20})
        for name in ("vocab_size", "length"):
            require(getattr(self, name) >= 1, f"text.{name}={getattr(self, name)} must be positive")
        require(self.rope_theta > 0, f"text.rope_theta={self.rope_theta} must be positive")
        padding, size = self.pad_token_id, self.vocab_size
        fits = padding is None or 0 <= padding < size
        require(fits, f"text.pad_token_id={padding} must be below text.vocab_size={size}")
