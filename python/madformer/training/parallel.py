"""One process or many: who this process is, and how the model is spread over all of them."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from madformer.machine import device_of, this_process
from madformer.model import MADFormer
from madformer.seeds import seed_all
from madformer.training.config import TrainingConfig
from madformer.training.initial import make_initial

# What costs more to run again than to keep.
KEPT_OPS = ("mm", "addmm", "bmm", "_scaled_dot_product", "block_causal_attention", "convolution")


@dataclass(frozen=True)
class World:
    """Attributes:
    rank, size: of all processes. device: this one's. mesh: of all of them, None for a process alone.
    """

    rank: int
    size: int
    device: torch.device
    mode: str
    mesh: DeviceMesh | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Over all processes; in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Over all processes; in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what a process may refuse by itself, with no exchange in it: where one raises, all end.

        One says why; the others end with status 1.
        """
        raised: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            raised = error
        if self.size == 1:
            return
        first = self.largest(torch.tensor(self.size - self.rank if raised else 0)).item()
        if raised is not None and first == self.size - self.rank:
            raise raised
        if first:
            raise SystemExit(1)


def join(config: TrainingConfig) -> World:
    """This process among those that torchrun started, or alone.

    Raises:
        ValueError: the configuration asks for what the processes are not, or for a device that is not there.
    """
    rank, size = this_process()
    mode = config.parallel if config.parallel != "auto" else ("ddp" if size > 1 else "none")
    if size > 1 and mode == "none":
        raise ValueError(f"parallel='none' is for one process, and torchrun started {size}")
    device = torch.device(device_of(config.device))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if mode == "none":
        return World(0, 1, device, mode, None)
    _check_groups(config, mode, size)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                f"parallel={mode!r} needs torchrun: torchrun --no-python --nproc-per-node N madformer train"
            )
        # gloo beside NCCL: checkpoints are gathered and written from the processors' memory, behind the next steps
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    shape, names = _mesh_shape(config, mode, size)
    return World(rank, size, device, mode, init_device_mesh(device.type, shape, mesh_dim_names=names))


def leave() -> None:
    """After the last step: a process that ends within its groups waits for them forever."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _mesh_shape(config: TrainingConfig, mode: str, size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if mode == "hsdp":
        group = config.shard_group or int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return (size // group, group), ("replicate", "shard")
    return (size,), ("replicate" if mode == "ddp" else "shard",)


def _check_groups(config: TrainingConfig, mode: str, size: int) -> None:
    share = config.accumulation_steps * size
    if config.batch_size % share:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of accumulation_steps={config.accumulation_steps} x "
            f"{size} processes"
        )
    if mode == "hsdp" and config.shard_group and size % config.shard_group:
        raise ValueError(f"shard_group={config.shard_group} must divide the {size} processes")


def make_model(config: TrainingConfig, world: World, unread: frozenset[str]) -> tuple[MADFormer, nn.Module]:
    """The model with its initial weights, and what a training step calls.

    Parameters are allocated where and as they stay: other processes than the first never hold the whole model. The
    first draws the weights on its processor, so that every way of running starts from the same ones.

    Args:
        unread: names of parameters that no loss of this configuration depends on; they are not trained. A gradient for
            every trained one in every step is what DDP asks for.
    """
    sharded = world.mode in ("fsdp", "hsdp")
    with torch.device("meta" if sharded and not world.is_first else "cpu"):
        seed_all(config.seed)
        holds = not sharded or world.is_first
        model = make_initial(config, unread) if holds else MADFormer(config.model)
    drawn: dict[str, Any] = model.state_dict() if sharded and world.is_first else {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in unread)
    if config.compile_mode == "reduce-overhead" and world.device.type != "cuda":
        warnings.warn(
            f"compile_mode='reduce-overhead' has no effect on {world.device.type}: no CUDA graphs", stacklevel=2
        )
    for layer in model.layers:
        _keep_less(layer, config.activation_checkpointing)
    if config.compile:
        # not the U-Net on a GPU, where it calls Triton's kernels and nobody has tried it, nor one that is sharded later
        halves = [model.downsampler, model.upsampler] if world.device.type == "cpu" and not sharded else []
        for part in [*model.layers, *halves]:
            part.compile(mode=config.compile_mode)
    if sharded:
        _shard(model.to("meta"), config, world)
        model.to_empty(device=world.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
        set_model_state_dict(model, drawn, options=options)
    else:
        model.to(world.device)
        # cuDNN and oneDNN convolve channels-last fastest, and blocks of latents arrive so
        for unet in (model.downsampler, model.upsampler):
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train().set_backend(config.backend, config.attention_backend or None)
    if world.mode == "ddp":
        return model, DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    return model, model


def _shard(model: MADFormer, config: TrainingConfig, world: World) -> None:
    """Every layer is gathered when it is its turn, everything else (the U-Net's halves) for the whole step."""
    assert world.mesh is not None
    # nothing is written into the prediction
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    # rotary tables are among a layer's arguments, and stay fp32
    layers = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=layers)
    # timesteps are raw integers, which bf16 cannot hold; autocast casts the convolutions' weights
    fully_shard(model, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def _keep_less(layer: nn.Module, mode: str) -> None:
    """Make a layer keep less of its forward pass for its backward pass."""
    if mode == "none":
        return
    forward = layer.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, **options, **kwargs)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition("::")[2].partition(".")[0]
    kept = any(name == known or (known[0] == "_" and name.startswith(known)) for known in KEPT_OPS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def accumulating(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Around a micro-batch: gradients are exchanged after the last one alone."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every process, which all must call this; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
