"""What a training step costs, found by tracing one on fake tensors: nothing is allocated or computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from madformer.config import MADFormerConfig
from madformer.kernels import BlockLayout
from madformer.model import MADFormer
from madformer.model.layer import Attention, Projections
from madformer.training.config import TrainingConfig
from madformer.training.losses import Batch, LossWeights, training_losses
from madformer.training.noise import noise_schedule

OPTIMIZER_BYTES = 8  # AdamW's two fp32 moments of a parameter


@dataclass(frozen=True)
class Costs:
    """Of one image.

    Attributes:
        parameters: of the model. unread: names of those that no loss depends on.
        flops: forward and backward, two for a multiply-add, of products, convolutions and attention over what the mask
            lets through; nothing is counted twice that checkpointing runs twice.
        activation_bytes: kept from forward to backward, with plain kernels and without checkpointing; fused kernels
            keep less.
    """

    parameters: int
    unread: frozenset[str]
    flops: int
    activation_bytes: int

    def memory(self, config: TrainingConfig, processes: int) -> dict[str, int]:
        """Bytes on one of ``processes`` devices, by what they are for."""
        shards = {"fsdp": processes, "hsdp": config.shard_group or processes}.get(config.parallel, 1)
        images = config.batch_size // (config.accumulation_steps * processes)
        return {
            "weights": 4 * self.parameters // shards,
            "gradients": 4 * self.parameters // shards,
            "optimizer": OPTIMIZER_BYTES * self.parameters // shards,
            "averages": 4 * self.parameters * len(config.ema_decays) // shards,
            "activations": images * self.activation_bytes,
        }


def loss_weights(config: TrainingConfig) -> LossWeights:
    return LossWeights(
        image=config.image_loss_weight,
        hidden=config.hidden_loss_weight,
        clean=config.clean_loss_weight,
        text=config.text_loss_weight,
        min_snr_gamma=config.min_snr_gamma,
        padding=None if config.model.text is None else config.model.text.pad_token_id,
    )


def costs_of(config: TrainingConfig) -> Costs:
    return _costs(config.model, loss_weights(config), config.precision != "fp32")


@functools.lru_cache(maxsize=4)
def _costs(config: MADFormerConfig, weights: LossWeights, bf16: bool) -> Costs:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    scheduler = noise_schedule(config.prediction_type)  # of real numbers: some look at them
    # of PyTorch's attention in the U-Net, the counter knows the products of this backend
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        model = _Traced(config)
        model.set_backend("reference")
        latents = torch.empty(1, config.num_blocks, config.latents_per_block, config.latent_channels)
        timestep = torch.zeros(1, config.num_blocks, dtype=torch.int64)
        text = torch.zeros(1, config.text_length, dtype=torch.int64) if config.text else None
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        batch = Batch(latents, latents, timestep, labels, text_BP=text)
        with FlopCounterMode(display=False) as counter:
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=bf16),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                losses = training_losses(model, batch, scheduler, weights)
            losses.total.backward()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        return Costs(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            unread=frozenset(name for name, parameter in model.named_parameters() if parameter.grad is None),
            flops=counter.get_total_flops() + model.attention_flops,
            activation_bytes=sum(
                tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own
            ),
        )


class _Traced(MADFormer):
    """Its attention is counted by what the mask lets through, and keeps what a fused kernel keeps."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__(config)
        self.attention_flops = 0

    def attention(self, layout: BlockLayout) -> Attention:
        pairs = sum(stop - start for ranges in layout.key_ranges() for start, stop in ranges) * layout.block_size
        pairs += layout.text_query_length * (layout.text_query_length + 1) // 2

        def attend(projections: Projections) -> Tensor:
            q_BHLD, keys_BHSD, values_BHSD = projections.heads()
            # two products forward and four backward
            self.attention_flops += 6 * 2 * pairs * q_BHLD.shape[1] * q_BHLD.shape[3]
            attended: Tensor = _FusedAttention.apply(q_BHLD, keys_BHSD, values_BHSD)
            return attended

        return attend


class _FusedAttention(torch.autograd.Function):
    """Keeps its arguments, its result and a number for each query; the arithmetic is left out."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, keys_BHSD: Tensor, values_BHSD: Tensor) -> Tensor:
        attended_BHLD = torch.empty_like(q_BHLD)
        ctx.save_for_backward(q_BHLD, keys_BHSD, values_BHSD, attended_BHLD, q_BHLD.new_empty(q_BHLD.shape[:3]))
        return attended_BHLD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
