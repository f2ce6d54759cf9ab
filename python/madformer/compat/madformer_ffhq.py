"""Drop-in for the released FFHQ implementation (``Junhaoo-Chen/MADFormer``, branch ``main``).

The constructor, the names and shapes of state and parameters, ``forward`` and ``sample`` are the released ones, and
the numbers agree to fp32 rounding, quirks included. The network itself is the native one: this class only hangs its
modules under the released names.

Shape legend, in the released letters: N images, T blocks, B latents of a block, C channels, H rows, W columns.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from madformer.compat.checkpoint import ReleasedCheckpoint, Weights
from madformer.compat.parts import Names, Released, reorder
from madformer.config import Context, MADFormerConfig, UNetConfig
from madformer.files.weights import load_weights
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.blocks import to_maps
from madformer.model.layer import Tower, TransformerLayer
from madformer.model.madformer import MADFormerOutput

# (clear_clean, clear_cond)
CONTEXTS: dict[tuple[bool, bool], Context] = {
    (False, False): "clean+condition",
    (False, True): "clean",
    (True, False): "condition",
    (True, True): "noise",
}

# A tower's part in every released list of a layer.
LISTS = {
    "self_attn.qkv_list": "qkv",
    "self_attn.q_norm_list": "q_norm",
    "self_attn.k_norm_list": "k_norm",
    "self_attn.proj_list": "proj",
    "mlp_list": "mlp",
    "input_layernorm_list": "input_norm",
    "post_attention_layernorm_list": "post_attention_norm",
}

# What the released configuration falls back to: transformers' LlamaConfig, then its own additions.
LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "intermediate_size": 11008,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32_000,
    "pad_token_id": None,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "unet_block_out_channels": [512, 1024],
    "unet_num_layers_per_block": [2, 2],
    "unet_resnet_groups": 8,
    "unet_transformer_layers_per_block": [0, 1],
    "unet_num_heads": 8,
    "unet_time_emb_dim": 128,
}

# What a file may ask for before a tensor's shape is compared: loops and tables are as long.
CONFIG_LIMITS = {
    "unet_num_layers_per_block": 64,
    "unet_transformer_layers_per_block": 64,
    "unet_block_out_channels": 2**16,
    "max_position_embeddings": 2**20,
}


class MADFormer(Released):
    """The released constructor, ``forward`` and ``sample`` over the native network.

    Args:
        block_size, ar_len, spatial_len: tokens of a block, blocks, and tokens of the image (their product).
        hidden_size, depth, num_heads: the Transformer; ``diff_depth`` of its layers are diffusion layers.
        model_config_path: JSON file of the released ``MADFormerConfig`` (a mapping is accepted too).
        clear_clean, clear_cond, denoising_mlp: the ablations: condition only, clean blocks only (with both, nothing but
            the noisy blocks before), block-local diffusion.
        cache_clean: accepted; the clean blocks' keys and values are always computed once, with the same result.
        patch_size, latent_size, in_channels, mlp_ratio, class_dropout_prob, learn_sigma: accepted and, as in the
            released code, without influence on the network.

    Raises:
        ValueError: an impossible geometry; the message names the fields.
    """

    streams: tuple[str, ...] = ("clean", "noise")
    """In the order of the released module lists."""
    whole_parts: tuple[str, ...] = ("downsampler", "upsampler")
    """Modules that have one name in both models."""

    def __init__(
        self,
        patch_size: int = 2,
        latent_size: int = 16,
        block_size: int = 256,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        diff_depth: int = 14,
        num_heads: int = 18,
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
        cache_clean: bool = False,
    ) -> None:
        super().__init__()
        if spatial_len != block_size * ar_len:
            raise ValueError(f"spatial_len={spatial_len} must be block_size={block_size} * ar_len={ar_len}")
        if model_config_path is None:
            raise ValueError("model_config_path must name the JSON file of the released model configuration")
        self.patch_size, self.latent_size, self.in_channels = patch_size, latent_size, in_channels
        self.block_size, self.ar_len, self.spatial_len = block_size, ar_len, spatial_len
        self.hidden_size, self.depth, self.diff_depth, self.num_heads = (hidden_size, depth, diff_depth, num_heads)
        self.clear_clean, self.clear_cond, self.denoising_mlp = clear_clean, clear_cond, denoising_mlp
        self.cache_clean, self.square_block, self.qk_norm = cache_clean, square_block, not no_qk_norm
        config = self._native_config(
            read_model_config(model_config_path),
            hidden_size=hidden_size,
            num_layers=depth,
            num_heads=num_heads,
            num_blocks=ar_len,
            block_size=block_size,
            diffusion_layers=diff_depth,
            qk_norm=not no_qk_norm,
            context=CONTEXTS[clear_clean, clear_cond],
            cross_block_attention=not denoising_mlp,
            square_blocks=square_block,
        )
        self._adopt(NativeMADFormer(config))

    def _native_config(self, model_config: Mapping[str, Any], **fields: Any) -> MADFormerConfig:
        """``fields`` and what a released model configuration says, with the quirks of the released code."""
        return native_config(model_config, hidden_loss_input="condition+noisy", **fields)

    def _adopt(self, native: NativeMADFormer) -> None:
        """Hang the native modules under the released names; unused ones are made, to be loaded and saved."""
        config = native.config
        if not config.has_condition:
            self.boi_block = nn.Parameter(torch.randn(1, config.block_size, config.hidden_size))
        else:
            self.boi_block = native.boi
        self.downsampler = native.downsampler
        self.upsampler = reorder(native.upsampler, "up_blocks", "conv_in", "time_embedding", "conv_out")
        self._adopt_text(native)
        self.blocks = nn.ModuleList(
            ReleasedLayer(config, cast(TransformerLayer, layer), self.streams) for layer in native.layers
        )
        self._share_all({"native": native})

    def _adopt_text(self, native: NativeMADFormer) -> None:
        """What a model with text has between U-Net and layers."""

    def _share_all(self, networks: dict[str, NativeMADFormer]) -> None:
        pairs = [(name, network, name) for network in networks.values() for name in self.whole_parts]
        for network in networks.values():
            for index, layer in enumerate(network.layers):
                for stream in cast(TransformerLayer, layer).towers:
                    place = self.streams.index(stream)
                    pairs += [
                        (f"blocks.{index}.{name}.{place}", network, f"layers.{index}.towers.{stream}.{part}")
                        for name, part in LISTS.items()
                    ]
        self.__dict__["agreed_boi"] = self.boi_block
        self._share(networks, pairs, [name for name, _ in nn.Module.named_modules(self) if name.endswith("text_rope")])

    def _follow(self, *, check: bool = True) -> None:
        super()._follow(check=check)
        # a parametrised one is computed; and it must have no graph where a copy is to be made
        with contextlib.nullcontext() if check else torch.no_grad():
            boi = self.boi_block
        for network in self.__dict__["networks"].values():
            if "boi" not in network._parameters or network._parameters["boi"] is boi:
                continue
            if network._parameters["boi"] is not self.__dict__["agreed_boi"]:
                self._parameters["boi_block"] = boi = network._parameters["boi"]
            network._parameters["boi"] = boi
        self.__dict__["agreed_boi"] = boi

    def forward(self, clean_x: Tensor, noised_x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The training pass.

        Args:
            clean_x, noised_x: latents ``(N, T, B, C)``.
            t: integer timesteps ``(N, T)``, on any device.

        Returns:
            Prediction, condition and clean tower's output (None with ``clear_clean``), each ``(N * T, C, H, W)``.
        """
        outputs, _ = self._training_pass(clean_x, noised_x, t)
        return outputs

    def _training_pass(
        self, clean_x: Tensor, noised_x: Tensor, t: Tensor, input_ids: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor | None]:
        """What :meth:`forward` returns, with a prediction that depends on every parameter, and a text's logits."""
        native, reads_text = self.to_native(), input_ids is not None
        t, clean = t.to(clean_x.device), native.config.has_clean_stream
        output = native(clean_x, noised_x, t, input_ids, return_clean=clean, return_logits=reads_text)
        prediction = output.prediction
        if torch.is_grad_enabled() and (unused := self._possibly_unused(native)):
            # Nothing of each parameter: its gradient is zero where the loss reaches it by no other way.
            prediction = prediction + torch.cat([parameter.flatten()[:0] for parameter in unused]).sum()
        condition = self._condition(output, clean_x, t, input_ids)
        maps = to_maps(prediction), to_maps(condition), None if output.clean is None else to_maps(output.clean)
        return maps, output.logits

    def _condition(self, output: MADFormerOutput, clean_x: Tensor, t: Tensor, input_ids: Tensor | None) -> Tensor:
        """What the autoregressive layers predict, in blocks."""
        assert output.condition is not None
        return output.condition

    def _possibly_unused(self, native: NativeMADFormer) -> list[nn.Parameter]:
        """Parameters that a loss may not reach: the released code gives those zero gradients, not None."""
        unused = [] if native.config.has_condition else [self.boi_block]
        last_read = native.clean_layers - 1
        for index, layer in enumerate(self.blocks):
            idle = {
                "text": index == len(self.blocks) - 1,
                "clean": not native.config.has_clean_stream or index >= last_read,
                "noise": not native.has_tower("noise", index),
            }
            for place, stream in enumerate(self.streams):
                if idle[stream]:
                    unused += stream_parameters(layer, place)
        return unused

    @torch.no_grad()
    def sample(
        self,
        scheduler: Any,
        num_inference_steps: int,
        target_shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Draw latents block by block.

        Args:
            scheduler: any diffusers scheduler.
            target_shape: ``(N, T, B, C)``.
            generator: one for the batch or one for each image; noise is drawn a block at a time.
            dtype: of the noise drawn and of the result; the update runs in fp32.

        Returns:
            Latents ``(N, T, B, C)``.
        """
        return self._draw(scheduler, num_inference_steps, target_shape, generator, dtype)

    @classmethod
    def from_released(
        cls,
        checkpoint: str | Path,
        *,
        model_config: str | Path | Mapping[str, Any] | None = None,
        weights: Weights = "ema",
    ) -> Self:
        """Load a released training checkpoint (``ckpts.pt``), never running code that it may contain.

        Args:
            model_config: the JSON that ``model_config_path`` named in training; without it, what the shapes
                tell, and the released file's values for the rest.
            weights: the exponential moving average or the raw weights.

        Raises:
            FileNotFoundError, ValueError: no such file, no such checkpoint, or weights that do not fit.
        """
        return cls.from_checkpoint(ReleasedCheckpoint.load(checkpoint, weights), model_config)

    @classmethod
    def from_checkpoint(
        cls, released: ReleasedCheckpoint, model_config: str | Path | Mapping[str, Any] | None = None
    ) -> Self:
        """:meth:`from_released` of what was read already; the model takes its weights over."""
        arguments = released.constructor_arguments(model_config)
        try:
            with torch.device("meta"):
                model = cls(**arguments)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{released.path} and its model configuration are of no model: {reason}") from error
        load_weights(model, released.state, origin=released.path, assign=True)
        return model.eval()


class ReleasedLayer(nn.Module):
    """One layer's towers as the parallel module lists of the released code."""

    def __init__(self, config: MADFormerConfig, layer: TransformerLayer, streams: Sequence[str]) -> None:
        super().__init__()
        towers = [
            cast(Tower, layer.towers[stream]) if stream in layer.towers else _unused_tower(config) for stream in streams
        ]
        self.self_attn = Names()
        for path, part in LISTS.items():
            owner, _, name = path.rpartition(".")
            self.get_submodule(owner).add_module(name, nn.ModuleList(tower.get_submodule(part) for tower in towers))


def _unused_tower(config: MADFormerConfig) -> Tower:
    tower = Tower(config)
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return tower


def stream_parameters(layer: nn.Module, stream: int) -> list[nn.Parameter]:
    """What one stream passes in a layer with the released names, as far as it is trained."""
    parts = (layer.get_submodule(f"{name}.{stream}") for name in LISTS)
    return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]


def native_config(values: Mapping[str, Any], **fields: Any) -> MADFormerConfig:
    """``fields`` and what shapes the network in a released model configuration, with the quirks of the released code.

    Raises:
        ValueError: an impossible geometry.
    """
    if values["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act={values['hidden_act']!r}: the released models and this one use 'silu'")
    return MADFormerConfig(
        rope_pairing="released",
        clean_timestep="noisy",
        hidden_loss_skips="same_block",
        intermediate_size=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        mlp_bias=values["mlp_bias"],
        unet=UNetConfig(
            block_out_channels=tuple(values["unet_block_out_channels"]),
            layers_per_block=tuple(values["unet_num_layers_per_block"]),
            attention=tuple(count == 1 for count in values["unet_transformer_layers_per_block"]),
            num_heads=values["unet_num_heads"],
            norm_groups=values["unet_resnet_groups"],
            time_embed_dim=values["unet_time_emb_dim"],
        ),
        **fields,
    )


def read_model_config(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A released model configuration with its defaults; raises ``ValueError`` for what is none."""
    if isinstance(source, Mapping):
        values = dict(source)
    else:
        try:
            values = json.loads(Path(source).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{source} holds a {type(values).__name__}, and no model configuration")
    for name, limit in CONFIG_LIMITS.items():
        numbers = values.get(name, 1)
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if type(number) is not int or not 0 <= number <= limit:
                raise ValueError(f"the model configuration has {name}={numbers!r}, and not numbers up to {limit}")
    return {**LLAMA_DEFAULTS, **values}
