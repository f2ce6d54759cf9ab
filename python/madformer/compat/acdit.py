"""Drop-in for ACDiT (``thunlp/ACDiT``): images by class, every layer a diffusion layer.

It is no network of its own. In our terms every layer is a diffusion layer, there are clean blocks and no condition, one
tower for both streams, patches in place of the U-Net, and AdaLN-Zero tells the noise stream time and class.

Shape legend, in the released letters: N images, T blocks, B tokens of a block, C numbers of a token (a patch of
latents, as ``(row, column, channel)``); L latents of a block.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from madformer.compat.parts import Names, Released, names
from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.layer import GELU, TransformerLayer
from madformer.model.patches import PatchDecoder, PatchEmbedding

NORM_EPS = 1e-6
# Where the native model has each part: of the whole, and of a layer's tower.
ROOT_PARTS = {
    "t_embedder.mlp.0": "conditioner.linear_1",
    "t_embedder.mlp.2": "conditioner.linear_2",
    "y_embedder.embedding_table": "conditioner.classes",
    "x_embedder": "downsampler.proj",
    "final_layer.norm_final": "upsampler.norm",
    "final_layer.linear": "upsampler.proj",
    "final_layer.adaLN_modulation.1": "upsampler.modulation",
}
LAYER_PARTS = {
    "norm1": "input_norm",
    "norm2": "post_attention_norm",
    "attn.qkv": "qkv",
    "attn.q_norm": "q_norm",
    "attn.k_norm": "k_norm",
    "attn.proj": "proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "adaLN_modulation.1": "modulation",
}


class ACDiT(Released):
    """The released constructor, ``forward`` and ``sample`` over the native network.

    Args:
        patch_size: side of a patch in latents; it only says what the ``latent_size`` numbers of a token are.
        block_size, ar_len, spatial_len: tokens of a block, blocks, and tokens of the image (their product).
        hidden_size, depth, num_heads, mlp_ratio: the Transformer.
        class_dropout_prob: of a label in ``forward``, in eval mode too; it is ``y_embedder.dropout_prob``.
        in_channels, learn_sigma, num_frames: accepted and, as in the released code, without influence on the network.

    Raises:
        ValueError: an impossible geometry, or video, which is not implemented; the message names the fields.
    """

    def __init__(
        self,
        patch_size: int = 2,
        latent_size: int = 16,
        block_size: int = 256,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 101,
        learn_sigma: bool = False,
        num_frames: int = 16,
        no_qk_norm: bool = False,
        ar_len: int = 4,
        temporal_len: int = 1,
        spatial_len: int = 1024,
        nd_split: str | None = None,
        square_block: bool = True,
    ) -> None:
        super().__init__()
        if temporal_len != 1 or nd_split not in (None, "1_1"):
            raise ValueError(f"temporal_len={temporal_len}, nd_split={nd_split!r}: there are images here, and no video")
        if spatial_len != block_size * ar_len:
            raise ValueError(f"spatial_len={spatial_len} must be block_size={block_size} * ar_len={ar_len}")
        self.patch_size, self.latent_size, self.in_channels = patch_size, latent_size, in_channels
        self.block_size, self.ar_len, self.spatial_len = block_size, ar_len, spatial_len
        self.hidden_size, self.depth, self.num_heads, self.mlp_ratio = hidden_size, depth, num_heads, mlp_ratio
        self.num_classes, self.num_frames, self.temporal_len = num_classes, num_frames, temporal_len
        self.learn_sigma, self.square_block, self.qk_norm = learn_sigma, square_block, not no_qk_norm
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        # numbers that are no patches of that size are taken for the channels of one latent
        side = patch_size if latent_size % patch_size**2 == 0 else 1
        config = MADFormerConfig(
            hidden_size=hidden_size,
            num_layers=depth,
            num_heads=num_heads,
            intermediate_size=int(hidden_size * mlp_ratio),
            norm_eps=NORM_EPS,
            qk_norm=not no_qk_norm,
            mlp="gelu",
            mlp_bias=True,
            num_blocks=ar_len,
            block_size=block_size,
            diffusion_layers=depth,
            latent_channels=latent_size // side**2,
            unet=None,
            patch_size=side,
            num_classes=num_classes,
            null_class=class_dropout_prob > 0,
            time_conditioning="adaln",
            context="clean",
            shared_towers=True,
            rope_pairing="released",
            clean_timestep="noisy",
            square_blocks=square_block,
        )
        self._adopt(NativeMADFormer(config), class_dropout_prob)

    def _adopt(self, native: NativeMADFormer, class_dropout_prob: float) -> None:
        """Hang the native modules under the released names."""
        embedding, decoder = cast(PatchEmbedding, native.downsampler), cast(PatchDecoder, native.upsampler)
        conditioner = native.conditioner
        self.t_embedder = names(mlp=nn.Sequential(conditioner.linear_1, nn.SiLU(), conditioner.linear_2))
        self.y_embedder = LabelEmbedder(conditioner.classes, self.num_classes, class_dropout_prob)
        self.x_embedder = embedding.proj
        self.blocks = nn.ModuleList(released_layer(cast(TransformerLayer, layer)) for layer in native.layers)
        modulation = nn.Sequential(nn.SiLU(), decoder.modulation)
        self.final_layer = names(norm_final=decoder.norm, linear=decoder.proj, adaLN_modulation=modulation)
        pairs = list(ROOT_PARTS.items())
        for index in range(self.depth):
            tower = f"layers.{index}.towers.image."
            pairs += [(f"blocks.{index}.{released}", tower + name) for released, name in LAYER_PARTS.items()]
        activations = [name for name, part in nn.Module.named_modules(self) if isinstance(part, nn.SiLU)]
        self._share({"native": native}, [(released, native, name) for released, name in pairs], activations)

    def forward(self, clean_x: Tensor, noised_x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The training pass.

        Args:
            clean_x, noised_x: tokens ``(N, T, B, C)``.
            t: integer timesteps ``(N, T)``, or ``(N,)`` for all blocks.
            y: classes ``(N,)``; None leaves all of them out.

        Returns:
            Prediction ``(N, T * B, C)``.
        """
        native = self.to_native()
        timestep_NT = (t if t.dim() == 2 else t[:, None].expand(-1, clean_x.shape[1])).to(clean_x.device)
        labels = self.y_embedder(torch.full((len(clean_x),), -1) if y is None else y, train=True).to(clean_x.device)
        latents = self.to_latents(clean_x), self.to_latents(noised_x)
        output = native(*latents, timestep_NT, labels_B=labels, return_condition=False)
        return self.to_tokens(output.prediction).flatten(1, 2)

    @torch.no_grad()
    def sample(
        self,
        y: Tensor,
        scheduler: Any,
        num_inference_steps: int,
        cfg: float,
        target_shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Draw tokens block by block.

        Args:
            y: classes ``(N,)``.
            cfg: scale of classifier-free guidance; up to 1 there is none.

        The other arguments and the result are those of :meth:`madformer.compat.madformer_ffhq.MADFormer.sample`, of
        tokens in place of latents.
        """
        prompt, guidance = Prompt(label=y), max(1.0, float(cfg))
        return self._draw(scheduler, num_inference_steps, target_shape, generator, dtype, prompt, guidance)

    @property
    def _target(self) -> tuple[int, int, int]:
        return self.ar_len, self.block_size, self.latent_size

    def to_latents(self, tokens_NTBC: Tensor) -> Tensor:
        """Tokens of every block as latents in raster order, ``(N, T, L, channels)``."""
        side, size = math.isqrt(self.block_size), self.config.patch_size
        x = tokens_NTBC.unflatten(3, (size, size, -1)).unflatten(2, (side, side))
        return x.transpose(3, 4).flatten(2, 5)

    def to_tokens(self, latents_NTLC: Tensor) -> Tensor:
        """Inverse of :meth:`to_latents`."""
        side, size = math.isqrt(self.block_size), self.config.patch_size
        x = latents_NTLC.unflatten(2, (side, size, side, size))
        return x.transpose(3, 4).flatten(4, 6).flatten(2, 3)


class LabelEmbedder(nn.Module):
    """The released module: a table, and the dropping of labels.

    Attributes:
        dropout_prob: may be set to 0 to keep all labels.
    """

    def __init__(self, table: nn.Embedding, num_classes: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table, self.num_classes, self.dropout_prob = table, num_classes, dropout_prob

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        """The labels, some of them left out: negative."""
        if not train or self.dropout_prob <= 0:
            return labels
        dropped = torch.rand(len(labels), device=labels.device) < self.dropout_prob
        return torch.where(dropped, -1, labels)


def released_layer(layer: TransformerLayer) -> Names:
    """The one tower of a layer under the released names."""
    tower = layer.tower("noise")
    mlp, modulation = cast(GELU, tower.mlp), cast(nn.Linear, tower.modulation)
    return names(
        norm1=tower.input_norm,
        attn=names(qkv=tower.qkv, q_norm=tower.q_norm, k_norm=tower.k_norm, proj=tower.proj),
        norm2=tower.post_attention_norm,
        mlp=names(fc1=mlp.up_proj, fc2=mlp.down_proj),
        adaLN_modulation=nn.Sequential(nn.SiLU(), modulation),
    )
