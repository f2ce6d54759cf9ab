"""MADFormer (arXiv 2506.07999): autoregressive layers give a condition, diffusion layers denoise on it.

The mask of training is no tensor: :class:`~madformer.kernels.block_causal_attention.BlockLayout`, made for each layer
in :meth:`MADFormer.layer_pass`, says which ranges of keys a block sees. In sampling the cache is the mask.

Shape legend: B batch, M blocks, L latents of a block, C channels, S tokens of a stream, T tokens of the text,
V vocabulary, N = B * M, E time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.kernels import BlockLayout, dispatch
from madformer.kernels.block_causal_attention import OP as ATTENTION
from madformer.kernels.cached_attention import OP as CACHED_ATTENTION
from madformer.model.blocks import from_maps, to_maps
from madformer.model.conditioner import Conditioner
from madformer.model.layer import Attention, Streams, Tower, TransformerLayer, masked_attention, set_backend
from madformer.model.patches import PatchDecoder, PatchEmbedding
from madformer.model.pretrained import PretrainedMixin
from madformer.model.rope import RotaryEmbedding, RotaryTables
from madformer.model.unet import Half, LearnedSkips, Skips, UNetDownsampler, UNetUpsampler, skip_connections


@dataclass
class MADFormerOutput(BaseOutput):
    """What :meth:`MADFormer.forward` gives; every tensor but the logits is ``(B, M, L, C)``.

    Subscripts are names, or places among what is not None, as in diffusers, whose ``"sample"`` is the prediction.

    Attributes:
        prediction: of every noisy block, by the diffusion layers, in ``config.prediction_type``.
        condition: what the autoregressive layers alone predict each block to be, for the hidden loss; None where they
            predict nothing or it was not asked for.
        clean: all blocks of the clean stream decoded, for its loss. logits: ``(B, T, V)``, of the token that follows
            each one of the text. Both None unless asked for.
    """

    prediction: Tensor
    condition: Tensor | None = None
    clean: Tensor | None = None
    logits: Tensor | None = None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__("prediction" if key == "sample" else key)


class MADFormer(PretrainedMixin, PeftAdapterMixin):
    """The network alone: what is computed, with no cache, timer or distributed call in it.

    Args:
        config: geometry and switches, or a mapping of its fields.
        fields: of the configuration, in place of one or as changes to it.

    :meth:`forward` is the training pass over all blocks. ``madformer.engine`` drives :meth:`embed`, the layers
    and :meth:`decode` block by block to sample. Kernels are chosen by :meth:`set_backend`.
    """

    backend = "auto"
    attention_backend = "auto"

    gradient_checkpointing = False
    _supports_gradient_checkpointing = True
    _no_split_modules = ("TransformerLayer", "ResnetBlock")
    _repeated_blocks = ("TransformerLayer",)
    # rounded to 8 bits, a norm or a timestep is another one
    _skip_layerwise_casting_patterns = ("norm", "time_embedding", "conditioner", "modulation", "embed_tokens")

    def __init__(self, config: MADFormerConfig | Mapping[str, Any] | None = None, **fields: Any) -> None:
        super().__init__()
        if not isinstance(config, MADFormerConfig):
            config = MADFormerConfig.from_dict({**(config or {}), **fields})
        elif fields:
            config = MADFormerConfig.from_dict({**config, **fields})
        self.config = config
        self.rope = RotaryEmbedding(config)
        self.downsampler = PatchEmbedding(config) if config.unet is None else UNetDownsampler(config)
        self.upsampler = PatchDecoder(config) if config.unet is None else UNetUpsampler(config)
        if config.modulated:
            self.conditioner = Conditioner(config)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config,
                [name for name in ("text", "clean", "noise") if self.has_tower(name, index)],
                modulated=config.modulated and index >= config.ar_layers,
            )
            for index in range(config.num_layers)
        )
        if config.text is not None:
            vocab_size, hidden = config.text.vocab_size, config.hidden_size
            self.embed_tokens = nn.Embedding(vocab_size, hidden, config.text.pad_token_id)
            self.lm_head = nn.Linear(hidden, vocab_size, bias=False)
        if config.has_condition:
            # BOI: what the first block, which has no predecessor, is predicted from
            self.boi = nn.Parameter(torch.empty(1, config.block_size, config.hidden_size))
            if config.hidden_loss_skips == "shifted":
                self.boi_skips = LearnedSkips(
                    nn.Parameter(torch.empty(channels, 1, 1)) for _, channels in skip_connections(config)
                )
        self.reset_parameters()

    def set_backend(self, backend: str = "auto", attention: str | None = None) -> Self:
        """Choose the implementation of the kernels.

        Args:
            backend: ``"auto"`` for the best one on the device at hand, ``"triton"`` or ``"reference"`` for that one.
            attention: of block-causal attention; ``backend`` where it is None. See
                :func:`madformer.kernels.block_causal_attention.block_causal_attention` for its further choices.

        Raises:
            ValueError: there is no backend of that name.
            BackendUnavailableError: it cannot run on the device where the model is.
        """
        dispatch.resolve(CACHED_ATTENTION, backend, self.device)
        dispatch.resolve(ATTENTION, attention or backend, self.device)
        set_backend(self, backend)
        self.attention_backend = attention or backend
        return self

    def load_lora_adapter(self, source: Any, prefix: str | None = "transformer", **options: Any) -> None:
        """As diffusers' method, from safetensors unless told otherwise (diffusers looks for a pickle)."""
        super().load_lora_adapter(source, prefix, **{"use_safetensors": True, **options})

    def set_split(self, diffusion_layers: int) -> Self:
        """Choose how many layers are diffusion layers, of a model that was trained for several numbers.

        Raises:
            ValueError: it was not trained for this one.
        """
        self.config.check_split(diffusion_layers)
        self.config = self.config.replace(diffusion_layers=diffusion_layers)
        return self

    def set_grid(self, rows: int, columns: int) -> Self:
        """Choose the size of images, in blocks. Positions beyond those of training are extrapolated.

        Raises:
            ValueError: a model that knows no other size, in one line why.
        """
        self.config = self.config.at_grid(rows, columns)
        self.rope.set_config(self.config)
        return self

    def has_tower(self, stream: str, layer: int) -> bool:
        """Whether a stream passes a layer at all in this configuration."""
        if stream == "text":
            return self.config.text is not None
        if stream == "clean":
            return self.config.has_clean_stream
        return self.config.has_condition or layer >= self.config.ar_layers

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The released initialisation: Xavier and no bias for linear layers, normal for BOI block and text tokens.

        What modulates begins at nothing, as does the decoder of patches.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, (Conditioner, Tower, PatchDecoder)):
                module.reset_modulation()
        if self.config.has_condition:
            nn.init.normal_(self.boi)
            for skip in getattr(self, "boi_skips", ()):
                nn.init.zeros_(skip)

    def embed(self, latents_BMLC: Tensor, temb_NE: Tensor) -> tuple[Tensor, Skips]:
        """Blocks of latents to tokens ``(B, S, hidden_size)`` and the U-Net's skip connections.

        ``temb_NE``: of each block, what the downsampler's ``time_embedding`` or its ``told`` makes of the timestep.
        """
        told_NT = Half.taken_by(self.downsampler, temb_NE, self.config.time_widths[0])
        maps, skips = self.downsampler(to_maps(latents_BMLC, self.config.block_latents), told_NT)
        num_tokens = latents_BMLC.shape[1] * self.config.block_size
        return maps.permute(0, 2, 3, 1).reshape(-1, num_tokens, maps.shape[1]), skips

    def decode(self, tokens_BSC: Tensor, temb_NE: Tensor, skips: Skips, modulation_NC: Tensor | None = None) -> Tensor:
        """Tokens back to blocks of latents ``(B, M, L, C)``."""
        maps = to_maps(tokens_BSC, self.config.block_tokens)
        num_blocks = tokens_BSC.shape[1] // self.config.block_size
        told_NT = Half.taken_by(self.upsampler, temb_NE, self.config.time_widths[1])
        return from_maps(self.upsampler(maps, told_NT, skips, modulation_NC), num_blocks)

    def modulation(self, timestep_BM: Tensor, labels_B: Tensor | None) -> Tensor | None:
        """What AdaLN layers project for every block, ``(B, M, C)``; None for a model without.

        Raises:
            ValueError: labels for a model without classes, or none for a model with.
        """
        if (labels_B is None) != (self.config.num_classes == 0):
            given = "none" if labels_B is None else "some"
            raise ValueError(f"this model has {self.config.num_classes} classes, and {given} were given")
        if not self.config.modulated:
            return None
        vector_BMC = self.conditioner.time(timestep_BM.flatten()).unflatten(0, timestep_BM.shape)
        if labels_B is not None:
            vector_BMC = vector_BMC + self.conditioner.label(labels_B)[:, None]
        return F.silu(vector_BMC)

    def time_embeddings(self, timestep_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What tells the time to the U-Net's halves and to AdaLN, in fp32 with ``config.told_widths`` numbers each."""
        down = Half.told_to(self.downsampler, timestep_N, self.config.told_widths[0])
        up = Half.told_to(self.upsampler, timestep_N, self.config.told_widths[1])
        modulation = self.conditioner.time(timestep_N) if self.config.modulated else down.new_empty(len(down), 0)
        return down, up, modulation

    def clean_timestep(self, timestep_BM: Tensor) -> Tensor:
        """The timestep that clean blocks are embedded and decoded with."""
        return torch.zeros_like(timestep_BM) if self.config.clean_timestep == "zero" else timestep_BM

    def forward(
        self,
        clean_BMLC: Tensor,
        noisy_BMLC: Tensor,
        timestep_BM: Tensor,
        text_BT: Tensor | None = None,
        labels_B: Tensor | None = None,
        *,
        diffusion_layers: int | None = None,
        order_BM: Tensor | None = None,
        return_condition: bool = True,
        return_clean: bool = False,
        return_logits: bool = False,
        return_dict: bool = True,
    ) -> MADFormerOutput:
        """Predict all blocks at once, each from its clean predecessors (teacher forcing) and its noisy self.

        Args:
            clean_BMLC: clean latents ``(B, M, L, C)``, block after block in the order that they are made in.
            noisy_BMLC: the same with noise added.
            timestep_BM: integer timestep of every block.
            text_BT: token ids of a model with text.
            labels_B: classes of a model with such, negative for one left out.
            diffusion_layers: of an elastic model, in this pass; None for the configuration's.
            order_BM: place of every block, for a model of random order; None for the model's own order.
            return_condition: decode the condition (the hidden loss needs it).
            return_clean: decode the clean stream (the clean-tower loss needs it). Without it the last clean block,
                which no other block attends to, never enters the Transformer.
            return_logits: predict the text's next tokens (the text loss needs it).
            return_dict: False for a tuple of what is not None, as diffusers has it.

        Raises:
            ValueError: a text or labels for a model without, or none for a model with; a text of another length; a
                split that the model is not for.
        """
        config, num_blocks = self.config, noisy_BMLC.shape[1]
        noisy, noisy_skips = self.embed(noisy_BMLC, self.downsampler.time_embedding(timestep_BM.flatten()))

        whole = return_clean or (return_condition and config.hidden_loss_skips == "same_block")
        embedded = num_blocks if whole else num_blocks - 1
        clean_timestep = self.clean_timestep(timestep_BM[:, :embedded])
        clean, clean_skips = self.embed_clean(clean_BMLC[:, :embedded], clean_timestep)

        streams = self.input_streams(text_BT, clean, noisy.dtype, num_blocks, whole_clean=return_clean)
        keep = [name for name, wanted in (("clean", return_clean), ("text", return_logits)) if wanted]
        modulation = self.modulation(timestep_BM, labels_B)
        if diffusion_layers is not None:
            self.config.check_split(diffusion_layers)
        ar_layers = config.num_layers - (diffusion_layers or config.diffusion_layers)
        tables = self.rope.tables(order_BM)
        streams, condition = self.transform(streams, noisy, ar_layers, tables, keep, modulation)
        outputs = {"prediction": self.decode_at(timestep_BM, streams["noise"], noisy_skips, labels_B)}
        if return_condition:
            decoded = self.decode_condition(condition, noisy, timestep_BM, clean_skips, labels_B)
            outputs |= {} if decoded is None else {"condition": decoded}
        if return_clean and "clean" in streams:
            outputs["clean"] = self.decode_at(clean_timestep, streams["clean"], clean_skips, labels_B)
        if return_logits and "text" in streams:
            outputs["logits"] = self.lm_head(streams["text"])
        return MADFormerOutput(**outputs) if return_dict else tuple(outputs.values())  # type: ignore[return-value]

    def decode_at(self, timestep_BM: Tensor, tokens_BSC: Tensor, skips: Skips, labels_B: Tensor | None) -> Tensor:
        """:meth:`decode` for blocks at these timesteps."""
        modulation_BMC = self.modulation(timestep_BM, labels_B) if self.config.unet is None else None
        modulation_NC = None if modulation_BMC is None else modulation_BMC.flatten(0, 1)
        return self.decode(tokens_BSC, self.upsampler.time_embedding(timestep_BM.flatten()), skips, modulation_NC)

    def input_streams(
        self, text_BT: Tensor | None, clean_BSC: Tensor, dtype: torch.dtype, num_blocks: int, *, whole_clean: bool
    ) -> Streams:
        """What enters the first layer: the text, the clean blocks, and those shifted by one; errors as :meth:`forward`.

        Args:
            clean_BSC: embedded clean blocks, all or all but the last.
            whole_clean: keep the last clean block.
        """
        streams: Streams = {}
        shifted = clean_BSC[:, : (num_blocks - 1) * self.config.block_size]
        if (text := self.embed_text(text_BT)) is not None:
            streams["text"] = text.to(dtype)
        if self.config.has_clean_stream and (whole_clean or num_blocks > 1):
            streams["clean"] = clean_BSC if whole_clean else shifted
        if self.config.has_condition:
            boi = self.boi.expand(len(clean_BSC), -1, -1).to(dtype)
            streams["noise"] = torch.cat((boi, shifted), dim=1)
        return streams

    def embed_text(self, text_BT: Tensor | None) -> Tensor | None:
        """Embedded tokens ``(B, T, hidden_size)``, None for a model without text; errors as :meth:`forward`."""
        expected, given = self.config.text_length, 0 if text_BT is None else text_BT.shape[1]
        if given != expected:
            raise ValueError(f"this model takes texts of {expected} tokens, got {given}")
        return None if text_BT is None else self.embed_tokens(text_BT)

    def embed_clean(self, clean_BMLC: Tensor, timestep_BM: Tensor) -> tuple[Tensor, Skips]:
        """:meth:`embed` for clean blocks, of which there may be none."""
        if clean_BMLC.shape[1] == 0:
            return clean_BMLC.new_empty(len(clean_BMLC), 0, self.config.hidden_size), ()
        return self.embed(clean_BMLC, self.downsampler.time_embedding(timestep_BM.flatten()))

    def transform(
        self,
        streams: Streams,
        noisy_BSC: Tensor,
        ar_layers: int,
        tables: RotaryTables,
        keep: Collection[str] = (),
        modulation: Tensor | None = None,
    ) -> tuple[Streams, Tensor | None]:
        """All layers under the training mask; also returns the condition, None where there is none.

        Args:
            ar_layers: the others are diffusion layers.
            tables: rotation of all blocks' tokens.
            keep: streams besides the noise whose output is wanted, not their keys and values alone.
            modulation: of the noise stream in the diffusion layers, ``(B, M, C)``.
        """
        streams = self.pass_layers(range(ar_layers), streams, tables, keep)
        condition = streams.get("noise")
        streams["noise"] = noisy_BSC if condition is None else condition + noisy_BSC
        layers = range(ar_layers, self.config.num_layers)
        return self.pass_layers(layers, streams, tables, keep, modulation), condition

    def pass_layers(
        self,
        layers: range,
        streams: Streams,
        tables: RotaryTables,
        keep: Collection[str] = (),
        modulation: Tensor | None = None,
    ) -> Streams:
        """Some layers under the training mask; a stream ends where nobody reads it any more."""
        for index in layers:
            end = {
                "text": self.config.num_layers,
                "clean": self.clean_layers,
                "noise": math.inf,
                **dict.fromkeys(keep, math.inf),
            }
            streams = {name: x for name, x in streams.items() if index < end[name]}
            outputs = [name for name in streams if index + 1 < end[name]]
            if streams:
                cross_block = self.config.cross_block_attention or index < self.config.ar_layers
                streams = self.layer_pass(self.layers[index], streams, tables, outputs, cross_block, modulation)
        return streams

    @property
    def clean_layers(self) -> int:
        """As :attr:`MADFormerConfig.clean_layers` has it."""
        return self.config.clean_layers

    def layer_pass(
        self,
        layer: nn.Module,
        streams: Streams,
        tables: RotaryTables,
        outputs: Collection[str],
        cross_block: bool,
        modulation: Tensor | None,
    ) -> Streams:
        size = self.config.block_size
        blocks = {name: x.shape[1] // size for name, x in streams.items() if name != "text"}
        layout = BlockLayout(
            size,
            blocks.get("noise", 0),
            blocks.get("clean", 0),
            cross_block,
            text_length=self.config.text_length,
            text_queries="text" in outputs,
            clean_queries="clean" in outputs,
        )
        cos, sin = tables
        rotation = {name: (cos[..., : n * size, :], sin[..., : n * size, :]) for name, n in blocks.items()}
        if "text" in streams:
            rotation["text"] = self.rope.text_tables()
        # tables stay behind where weights are fetched layer by layer
        device = next(iter(streams.values())).device
        rotation = {name: (cos.to(device), sin.to(device)) for name, (cos, sin) in rotation.items()}
        arguments = (streams, self.rope, rotation, self.attention(layout), outputs, modulation)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(layer, *arguments)
        return layer(*arguments)

    def attention(self, layout: BlockLayout) -> Attention:
        """What layers attend with in training."""
        return masked_attention(layout, self.attention_backend)

    def decode_condition(
        self,
        condition: Tensor | None,
        noisy_BSC: Tensor,
        timestep_BM: Tensor,
        clean_skips: Skips,
        labels_B: Tensor | None = None,
    ) -> Tensor | None:
        """The clean blocks that the condition alone predicts; what the hidden loss compares."""
        config = self.config
        if config.hidden_loss_input == "condition+noisy":
            condition = noisy_BSC if condition is None else condition + noisy_BSC
        if condition is None:
            return None
        if config.hidden_loss_skips == "shifted":
            if not config.has_condition:
                return None
            clean_skips = self.shift_skips(clean_skips, *timestep_BM.shape)
        return self.decode_at(self.clean_timestep(timestep_BM), condition, clean_skips, labels_B)

    def shift_skips(self, skips: Skips, batch: int, num_blocks: int) -> Skips:
        """Give every block the skip connections of its predecessor, and the first one learned ones."""
        rows, columns = self.config.block_latents
        shapes = [(rows // 2**level, columns // 2**level) for level, _ in skip_connections(self.config)]
        shifted = []
        for index, (boi, shape) in enumerate(zip(self.boi_skips(), shapes, strict=True)):
            maps = boi.expand(batch, 1, -1, *shape)
            if num_blocks > 1:
                previous = skips[index].unflatten(0, (batch, -1))[:, : num_blocks - 1]
                maps = torch.cat((maps.to(previous), previous), dim=1)
            shifted.append(maps.flatten(0, 1))
        return tuple(shifted)
