"""Our kernels and engine put into a released-style model that exists already, as Liger patches models.

    model = MADFormer(...)              # yours: the released class, or a copy of it in your project
    madformer.accelerate(model)         # before or after the optimiser, the EMA copy, DDP
    madformer.restore(model)            # as it was

Nothing of the module changes but two entries of its instance dictionary, ``forward`` and ``sample``. They run the
native network, whose parts have no weights of their own: each shares the parameter dictionary of the part of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.compat.checkpoint import ReleasedCheckpoint
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.compat.madformer_ffhq import check_target, draw, native_target, released_outputs, training_pass
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.layer import QK_NORM_EPS, RMSNorm
from madformer.model.rope import token_positions

Module = TypeVar("Module", bound=nn.Module)

PARTS = ("boi_block", "downsampler", "upsampler", "blocks")
SIZES = ("block_size", "ar_len", "spatial_len", "depth", "diff_depth", "num_heads")
SWITCHES = ("square_block", "clear_clean", "clear_cond", "denoising_mlp")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def accelerate(module: Module, *, backend: str = "auto", attention_backend: str | None = None) -> Module:
    """Run a released-style FFHQ model by this library: the same outputs, gradients and samples, faster.

    The model is recognised by its names and shapes, wherever its class lives. Its parameters, state dict, class, hooks,
    mode, copies (``deepcopy``, ``pickle``), a DDP around it and an optimiser over it stay what they are. Hooks on the
    model run; those on its parts could not, and are refused.

    Args:
        module: changed in place. It may be accelerated already: then only the backends change.
        backend, attention_backend: of the kernels, see :meth:`madformer.model.MADFormer.set_backend`.

    Returns:
        ``module``.

    Raises:
        ValueError: no such model, or one that differs from the released one; the message says in what.
        BackendUnavailableError: a backend cannot run on the device where the model is.
    """
    if isinstance(module, (CompatMADFormer, NativeMADFormer)):
        native = module.to_native() if isinstance(module, CompatMADFormer) else module
        native.set_backend(backend, attention_backend)
        return module
    acceleration = _acceleration_of(module) or Acceleration(module)
    acceleration.current().set_backend(backend, attention_backend)
    module.__dict__.update(forward=acceleration.forward, sample=acceleration.sample)
    return module


def restore(module: Module) -> Module:
    """Undo :func:`accelerate`, in place; returns ``module``.

    Raises:
        ValueError: it is not accelerated.
    """
    if _acceleration_of(module) is None:
        raise ValueError(f"this {type(module).__name__} is not accelerated, so there is nothing to restore")
    for name in ("forward", "sample"):
        del module.__dict__[name]
    return module


def _acceleration_of(module: nn.Module) -> Acceleration | None:
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, Acceleration) else None


class Acceleration:
    """What :func:`accelerate` binds to a module: the native network over its parameters."""

    def __init__(self, module: nn.Module) -> None:
        template = _recognise(module)
        for name, part in template.named_modules():
            if name and part._parameters:
                # The dictionary, not what is in it: `load_state_dict(assign=True)` and functional calls replace that.
                part.__dict__["_parameters"] = module.get_submodule(name)._parameters
        self.module, self.native = module, template.to_native()

    def current(self) -> NativeMADFormer:
        """The native network, with what belongs to no part of it brought up to date."""
        boi = cast(Tensor, self.module.boi_block)
        if "boi" in self.native._parameters:
            self.native._parameters["boi"] = cast(nn.Parameter, boi)
        if self.native.rope.cos.device != boi.device:
            self.native.rope.to(boi.device)
        return self.native

    def forward(self, clean_x: Tensor, noised_x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :meth:`madformer.compat.madformer_ffhq.MADFormer.forward`."""
        prediction, output = training_pass(self.current(), self.module, CompatMADFormer.streams, clean_x, noised_x, t)
        return prediction, *released_outputs(output)

    @torch.no_grad()
    def sample(
        self,
        scheduler: Any,
        num_inference_steps: int,
        target_shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """See :meth:`madformer.compat.madformer_ffhq.MADFormer.sample`."""
        native = self.current()
        check_target(target_shape, native_target(native.config))
        return draw(native, scheduler, num_inference_steps, target_shape, generator, dtype)


# Recognition


def _recognise(module: nn.Module) -> CompatMADFormer:
    """Our class of the same geometry, without weights. Raises ``ValueError`` where it differs from ``module``."""
    name = type(module).__name__
    if missing := [part for part in (*PARTS, *SIZES, *SWITCHES) if not hasattr(module, part)]:
        inside = getattr(module, "module", getattr(module, "_orig_mod", None))
        hint = f"; pass the {type(inside).__name__} inside it" if isinstance(inside, nn.Module) else ""
        raise ValueError(f"{name} is no released MADFormer: it has no {', '.join(missing)}{hint}")
    if "forward" in module.__dict__:
        raise ValueError(f"forward of this {name} was replaced by something else: accelerate it before that")
    try:
        with torch.device("meta"):
            template = CompatMADFormer(**_constructor_arguments(module))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no released MADFormer: {error}") from error
    if differences := list(_differences(template, module)):
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError(f"{name} differs from the released MADFormer: {'; '.join(differences[:3])}{more}")
    return template


def _constructor_arguments(module: Any) -> dict[str, Any]:
    """Of our class: sizes that the released class keeps, those that weights show, and settings of its parts."""
    arguments = {name: getattr(module, name) for name in (*SIZES, *SWITCHES)}
    checkpoint = ReleasedCheckpoint(module.state_dict(), arguments, Path(type(module).__name__))
    inferred = checkpoint.constructor_arguments(None)
    attention = next((part for part in module.downsampler.modules() if hasattr(part, "heads")), None)
    config = {
        **inferred["model_config_path"],
        "rms_norm_eps": module.blocks[0].input_layernorm_list[0].variance_epsilon,
        "unet_resnet_groups": module.downsampler.down_blocks[0].resnets[0].norm1.num_groups,
    }
    if attention is not None:
        config["unet_num_heads"] = attention.heads
    return {**inferred, **arguments, "model_config_path": config}


def _differences(template: CompatMADFormer, module: nn.Module) -> Iterator[str]:
    """What of ``module`` is not as the released code has it, in a few words each."""
    own, released = ({name: p.shape for name, p in model.named_parameters()} for model in (template, module))
    yield from (f"no parameter {name}" for name in own if name not in released)
    yield from (f"unknown parameter {name}" for name in released if name not in own)
    for name, shape in own.items():
        if released.get(name, shape) != shape:
            yield f"{name} has shape {tuple(released[name])}, not {tuple(shape)}"
    if own.keys() == released.keys():
        for name, part in template.named_modules():
            if name and part._parameters:
                yield from _part_differences(name, part, module.get_submodule(name))
        yield from _behaviour_differences(template, module)


def _part_differences(name: str, ours: nn.Module, theirs: nn.Module) -> Iterator[str]:
    if isinstance(ours, RMSNorm):
        eps = QK_NORM_EPS if "_norm_list" in name and "layernorm" not in name else ours.eps
        if getattr(theirs, "variance_epsilon", None) != eps:
            yield f"{name} is no RMS norm with variance_epsilon={eps}"
    elif type(theirs) is not type(ours):
        yield f"{name} is a {type(theirs).__name__}, not a {type(ours).__name__}"
    elif ours.extra_repr() != theirs.extra_repr():
        yield f"{name} has {theirs.extra_repr()}, not {ours.extra_repr()}"


def _behaviour_differences(template: CompatMADFormer, module: nn.Module) -> Iterator[str]:
    """What no weight tells: activations, dropout, positions, hooks."""
    probe = torch.linspace(-4, 4, 17)
    for name, part in module.named_modules():
        activation: Callable[[Tensor], Tensor] | None = getattr(part, "act_fn", None)
        if activation is not None and not torch.allclose(activation(probe), F.silu(probe)):
            yield f"{name}.act_fn is not SiLU"
        if isinstance(part, nn.Dropout) and part.p > 0:
            yield f"{name} drops {part.p:g} of its input"
        if name and any(getattr(part, kind) for kind in HOOKS):
            yield f"{name} has hooks, which would not run"
        if name and "forward" in part.__dict__:
            yield f"{name}.forward was replaced"
    positions = getattr(module, "position_ids_precompute", None)
    if positions is not None and not torch.equal(positions.cpu(), token_positions(template.config)):
        yield "position_ids_precompute numbers the tokens in another order"
