"""Drop-in for the released ImageNet implementation (``Junhaoo-Chen/MADFormer``, branch ``imagenet``): text, then image.

As :mod:`.madformer_ffhq`, with a third tower for the text.

Shape legend, in the released letters: N images, T blocks, B latents of a block, C channels, H rows, W columns; besides,
P tokens of the text, V vocabulary, and of the cache's rows R, S tokens of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.compat import madformer_ffhq
from madformer.compat.checkpoint import ReleasedCheckpoint
from madformer.compat.madformer_ffhq import CONTEXTS, native_config
from madformer.compat.parts import Names
from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig, TextConfig
from madformer.engine.cache import CacheView
from madformer.engine.graphs import EagerLauncher
from madformer.engine.passes import Passes
from madformer.engine.rows import take
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.layer import Attention, Projections, Streams
from madformer.model.madformer import MADFormerOutput

# Relative. The frequencies are a buffer, which is cast with the model: bf16 rounds by half of that.
FREQUENCY_TOLERANCE = 1e-2


class MADFormer(madformer_ffhq.MADFormer):
    """The released constructor, ``forward`` and ``sample`` over the native network.

    Args:
        model_config_path: as for FFHQ; its ``vocab_size``, ``pad_token_id``, ``rope_theta`` and
            ``max_position_embeddings``, the length of every text, count here.
        clear_cond: the condition is returned, and no diffusion layer reads it.

    The other arguments and the errors are those of :class:`madformer.compat.madformer_ffhq.MADFormer`.
    """

    streams = ("text", "clean", "noise")
    whole_parts = ("downsampler", "upsampler", "embed_tokens", "lm_head")

    def __init__(
        self,
        patch_size: int = 2,
        latent_size: int = 16,
        block_size: int = 256,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        diff_depth: int = 14,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        no_qk_norm: bool = False,
        ar_len: int = 4,
        spatial_len: int = 1024,
        square_block: bool = True,
        model_config_path: str | Path | Mapping[str, Any] | None = None,
        clear_clean: bool = False,
        clear_cond: bool = False,
        denoising_mlp: bool = False,
    ) -> None:
        super().__init__(
            patch_size, latent_size, block_size, in_channels, hidden_size, depth, diff_depth, num_heads, mlp_ratio,
            class_dropout_prob, learn_sigma, no_qk_norm, ar_len, spatial_len, square_block, model_config_path,
            clear_clean, clear_cond, denoising_mlp,
        )  # fmt: skip

    def _native_config(self, model_config: Mapping[str, Any], **fields: Any) -> MADFormerConfig:
        text = TextConfig(
            vocab_size=model_config["vocab_size"],
            length=model_config["max_position_embeddings"],
            pad_token_id=model_config["pad_token_id"],
            rope_theta=model_config["rope_theta"],
        )
        return native_config(model_config, hidden_loss_input="condition", text=text, **fields)

    def _adopt_text(self, native: NativeMADFormer) -> None:
        text, head_dim = native.config.text, native.config.head_dim
        assert text is not None
        self.max_len = text.length
        # There in every released state dict, in each layer too. The rotations are tabulated, and these are not read.
        self.text_rope = Names()
        self.text_rope.register_buffer("inv_freq", 1.0 / text.rope_theta ** (torch.arange(0, head_dim, 2) / head_dim))
        self.embed_tokens, self.lm_head = native.embed_tokens, native.lm_head

    def _share_all(self, networks: dict[str, NativeMADFormer]) -> None:
        for block in self.blocks:
            cast(Names, block.self_attn).text_rope = self.text_rope
        if self.clear_cond:
            networks["conditioning"] = self._conditioning(networks["native"])
        super()._share_all(networks)

    def _conditioning(self, native: NativeMADFormer) -> NativeMADFormer:
        """The network that predicts the condition, on the same weights: none of it is in ``native``."""
        with torch.device("meta"):
            model = NativeMADFormer(native.config.replace(context=CONTEXTS[self.clear_clean, False]))
        model.rope, model.boi = native.rope, self.boi_block
        return model

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, clean_x: Tensor, noised_x: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The training pass.

        Args:
            input_ids: tokens ``(N, P)``; the other arguments are those of FFHQ's.

        Returns:
            What FFHQ's does, and the logits of the next tokens ``(N, P, V)``.
        """
        outputs, logits = self._training_pass(clean_x, noised_x, t, input_ids)
        assert logits is not None
        return *outputs, logits

    def _condition(self, output: MADFormerOutput, clean_x: Tensor, t: Tensor, input_ids: Tensor | None) -> Tensor:
        """Also where the diffusion layers do not ask for it."""
        if not self.clear_cond:
            return super()._condition(output, clean_x, t, input_ids)
        model = self.__dict__["networks"]["conditioning"]
        clean, skips = model.embed_clean(clean_x, t)
        streams = model.input_streams(input_ids, clean, clean.dtype, clean_x.shape[1], whole_clean=False)
        condition = model.pass_layers(range(model.config.ar_layers), streams, model.rope.tables())["noise"]
        decoded: Tensor = model.decode_condition(condition, condition, t, skips)
        return decoded

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        input_ids: Tensor,
        scheduler: Any,
        num_inference_steps: int,
        target_shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Draw latents block by block.

        Args:
            input_ids: tokens ``(N, P)``.

        The other arguments and the result are those of :meth:`madformer.compat.madformer_ffhq.MADFormer.sample`.
        """
        options: dict[str, Any] = {}
        if self.denoising_mlp:
            options = {"passes": ReleasedBlockLocalPasses, "launcher": EagerLauncher()}
        prompt = Prompt(input_ids)
        return self._draw(scheduler, num_inference_steps, target_shape, generator, dtype, prompt, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As every module; raises ``ValueError`` for texts that were rotated by another ``rope_theta``."""
        for name in other_frequencies(state_dict.items(), self.config):
            assert self.config.text is not None
            theta = self.config.text.rope_theta
            raise ValueError(
                f"{name} has other frequencies than those of the model configuration's rope_theta={theta:g}"
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    @classmethod
    def from_checkpoint(
        cls, released: ReleasedCheckpoint, model_config: str | Path | Mapping[str, Any] | None = None
    ) -> Self:
        """As for FFHQ, but ``model_config`` must be given; raises ``ValueError`` where it is not."""
        if model_config is None:
            raise ValueError(
                "a model with text needs model_config, the released model configuration: no weight tells how long its "
                "texts are"
            )
        return super().from_checkpoint(released, model_config)


def other_frequencies(tensors: Iterable[tuple[str, Tensor]], config: MADFormerConfig) -> Iterator[str]:
    """Names of the rotary frequencies that are not those by which a model of ``config`` rotates its text."""
    if config.text is None:
        return
    expected = config.text.rope_theta ** (-torch.arange(0, config.head_dim, 2, device="cpu") / config.head_dim)
    for name, tensor in tensors:
        if name.endswith("inv_freq") and not (
            tensor.shape == expected.shape
            and (tensor.is_meta or torch.allclose(tensor.cpu().float(), expected, rtol=FREQUENCY_TOLERANCE, atol=0))
        ):
            yield name


class ReleasedBlockLocalPasses(Passes):
    """What the released sampler does under ``denoising_mlp``, which is not what was trained.

    In the diffusion layers the first block and the text see each other without a mask. With a clean stream, the text's
    keys and values of its first step stay for the steps that follow; without one they are made anew at each. Later
    blocks see themselves alone. It reads the host's place in the image, so it is not to be captured.
    """

    def first_block(self, rows_B: Tensor | None) -> None:
        self.is_first_block, self.text_is_read = True, False
        super().first_block(rows_B)

    def next_block(self, rows_B: Tensor | None) -> None:
        self.is_first_block = False
        super().next_block(rows_B)

    def read_text(self, rows_N: Tensor | None) -> None:
        tokens_NPC = self.model.embed_tokens(take(self.slots.text_NP, rows_N))
        self.text_NPC = self.run_layers("text", tokens_NPC, rows_N, range(self.config.ar_layers))
        self.cache.advance(self.config.text_length, rows_N)

    def diffuse(self, tokens_NSC: Tensor, rows_N: Tensor | None, modulation_NC: Tensor | None) -> Tensor:
        if not self.is_first_block or self.text_is_read:
            return super().diffuse(tokens_NSC, rows_N, modulation_NC)
        self.text_is_read = self.config.has_clean_stream
        streams: Streams = {"text": self.text_NPC, "noise": tokens_NSC}
        tables = {name: self.rotation(name, rows_N) for name in streams}
        for index in range(self.config.ar_layers, self.config.num_layers):
            layer, attend = self.model.layers[index], self._attend_together(index, rows_N)
            streams = layer(streams, self.model.rope, tables, attend, ["text", "noise"], modulation_NC)
        return streams["noise"]

    def _attend_together(self, index: int, rows_N: Tensor | None) -> Attention:
        length = self.config.text_length
        rows = slice(None) if rows_N is None else rows_N

        def attend(projections: Projections) -> Tensor:
            q, k, v = projections.heads()
            self.cache.keys_RHSD[index][rows, :, :length] = k[:, :, :length]
            self.cache.values_RHSD[index][rows, :, :length] = v[:, :, :length]
            return F.scaled_dot_product_attention(q, k, v)

        return attend

    def attention(self, view: CacheView, index: int, stream: str) -> Attention:
        if index < self.config.ar_layers or self.is_first_block:
            return super().attention(view, index, stream)
        return lambda projections: F.scaled_dot_product_attention(*projections.heads())
