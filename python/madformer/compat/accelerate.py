"""Our kernels and engine put into a released-style model that exists already, as Liger patches models.

    model = MADFormer(...)              # yours: the released class, or a copy of it in your project
    madformer.accelerate(model)         # before or after the optimiser, the EMA copy, DDP
    madformer.restore(model)            # as it was

Nothing of the module changes but two entries of its instance dictionary, ``forward`` and ``sample``. They are those of
a model of our class that has no weights of its own: its parts share the parameter dictionaries of the parts that have
their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.compat import madformer_ffhq, madformer_imagenet
from madformer.compat.checkpoint import ReleasedCheckpoint
from madformer.compat.madformer_ffhq import MADFormer as CompatMADFormer
from madformer.compat.parts import is_hooked
from madformer.model import MADFormer as NativeMADFormer
from madformer.model.layer import QK_NORM_EPS, RMSNorm
from madformer.model.plain import PreciseLinear
from madformer.model.rope import token_positions

Module = TypeVar("Module", bound=nn.Module)

SIZES = ("block_size", "ar_len", "spatial_len", "depth", "diff_depth", "num_heads")
SWITCHES = ("square_block", "clear_clean", "clear_cond", "denoising_mlp")
PARTS = ("boi_block", "downsampler", "upsampler", "blocks", *SIZES, *SWITCHES)
TEXT_PARTS = ("embed_tokens", "lm_head", "text_rope", "max_len")
FAMILIES: dict[type[CompatMADFormer], tuple[str, ...]] = {
    madformer_ffhq.MADFormer: PARTS,
    madformer_imagenet.MADFormer: (*PARTS, *TEXT_PARTS),
}
"""Our classes, and what an instance of the released one of each has."""
POSITIONS = ("position_ids_precompute", "text_position_ids")
ROOT_SETTINGS = (*SIZES, *SWITCHES, *POSITIONS, "max_len")
PLAIN = (bool, int, float, str, tuple, list)
UNWATCHED = ("training", *nn.Module().__dict__)


def accelerate(module: Module, *, backend: str = "auto", attention_backend: str | None = None) -> Module:
    """Run a released-style model by this library: the same outputs, gradients and samples, faster.

    The model, FFHQ's or ImageNet's, is recognised by its names and shapes, wherever its class lives. Its parameters,
    state dict, class, hooks, mode, copies (``deepcopy``, ``pickle``), a DDP around it and an optimiser over it stay
    what they are. Hooks on the model run; those on its parts could not, and are refused.

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
        _set_backend(module, backend, attention_backend)
        return module
    acceleration = _acceleration_of(module) or Acceleration(module)
    _set_backend(acceleration.current(), backend, attention_backend)
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


def _networks(model: CompatMADFormer | NativeMADFormer) -> list[NativeMADFormer]:
    """The native one, and the one that a model with text, but without the condition in its context, predicts it by."""
    if isinstance(model, NativeMADFormer):
        return [model]
    return list(model.__dict__["networks"].values())


def _set_backend(model: CompatMADFormer | NativeMADFormer, backend: str, attention_backend: str | None) -> None:
    for network in _networks(model):
        network.set_backend(backend, attention_backend)


class Acceleration:
    """What :func:`accelerate` binds to a module: a model of ours over its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._recognise()

    def _recognise(self) -> None:
        self.model = _recognise(self.module)
        self.known = [Known(name, part) for name, part in self.module.named_modules()]
        for name, part in self.model.named_modules():
            if part._parameters:
                # The dictionary, not what is in it: `load_state_dict(assign=True)` and functional calls replace that.
                part.__dict__["_parameters"] = self.module.get_submodule(name)._parameters

    def current(self) -> CompatMADFormer:
        """The model over the module as it is now; raises ``ValueError`` where it is no longer a released one."""
        if any(known.has_changed() for known in self.known):
            backends = [(network.backend, network.attention_backend) for network in _networks(self.model)]
            self._recognise()
            _set_backend(self.model, *backends[0])
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """The ``forward`` of one of :data:`FAMILIES`."""
        return self.current().forward(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """The ``sample`` of one of :data:`FAMILIES`."""
        return self.current().sample(*args, **kwargs)


class Known:
    """A part of a module as it was recognised, to tell whether it is still that."""

    def __init__(self, name: str, part: nn.Module) -> None:
        self.part, self.type, self.is_root = part, type(part), not name
        self.children = tuple(part._modules.values())
        # of the model itself, where scripts keep notes, what it is recognised by
        attributes = part.__dict__
        names = ROOT_SETTINGS if self.is_root else [name for name in attributes if name not in UNWATCHED]
        settings = [(name, attributes.get(name)) for name in names]
        self.values = [(name, value) for name, value in settings if isinstance(value, PLAIN)]
        self.objects = [(name, value) for name, value in settings if not isinstance(value, PLAIN)]

    def has_changed(self) -> bool:
        """Whether its ``forward`` may give something else by now; of its parameters' values nothing is asked."""
        part = self.part
        if type(part) is not self.type or len(part._modules) != len(self.children):
            return True
        if any(new is not old for new, old in zip(part._modules.values(), self.children, strict=True)):
            return True
        if not self.is_root and is_hooked(part):
            return True
        return any(getattr(part, name, None) != value for name, value in self.values) or any(
            getattr(part, name, None) is not value for name, value in self.objects
        )


# Recognition


def _recognise(module: nn.Module) -> CompatMADFormer:
    """A model of our class of the same geometry, without weights. Raises ``ValueError`` where it differs."""
    name = type(module).__name__
    family = madformer_imagenet.MADFormer if hasattr(module, "embed_tokens") else madformer_ffhq.MADFormer
    if missing := [part for part in FAMILIES[family] if not hasattr(module, part)]:
        inside = getattr(module, "module", getattr(module, "_orig_mod", None))
        hint = f"; pass the {type(inside).__name__} inside it" if isinstance(inside, nn.Module) else ""
        raise ValueError(f"{name} is no released MADFormer: it has no {', '.join(missing)}{hint}")
    if "forward" in module.__dict__ and _acceleration_of(module) is None:
        raise ValueError(f"forward of this {name} was replaced by something else: accelerate it before that")
    try:
        with torch.device("meta"):
            template = family(**_constructor_arguments(module))
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
    if hasattr(module, "embed_tokens"):
        config |= {
            "vocab_size": module.embed_tokens.num_embeddings,
            "pad_token_id": module.embed_tokens.padding_idx,
            "max_position_embeddings": module.max_len,
            "rope_theta": module.text_rope.base,
        }
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
        yield from _behaviour_differences(module)
        yield from _position_differences(template, module)


def _part_differences(name: str, ours: nn.Module, theirs: nn.Module) -> Iterator[str]:
    if isinstance(ours, RMSNorm):
        eps = QK_NORM_EPS if "_norm_list" in name and "layernorm" not in name else ours.eps
        if getattr(theirs, "variance_epsilon", None) != eps:
            yield f"{name} is no RMS norm with variance_epsilon={eps}"
    elif type(theirs) is not (released := nn.Linear if isinstance(ours, PreciseLinear) else type(ours)):
        yield f"{name} is a {type(theirs).__name__}, not a {released.__name__}"
    elif ours.extra_repr() != theirs.extra_repr():
        yield f"{name} has {theirs.extra_repr()}, not {ours.extra_repr()}"


def _behaviour_differences(module: nn.Module) -> Iterator[str]:
    """What no weight tells: activations, dropout, hooks."""
    probe = torch.linspace(-4, 4, 17)
    for name, part in module.named_modules():
        activation: Callable[[Tensor], Tensor] | None = getattr(part, "act_fn", None)
        if activation is not None and not torch.allclose(activation(probe), F.silu(probe)):
            yield f"{name}.act_fn is not SiLU"
        if isinstance(part, nn.Dropout) and part.p > 0:
            yield f"{name} drops {part.p:g} of its input"
        if name and "forward" in part.__dict__:
            yield f"{name}.forward was replaced"
        elif name and is_hooked(part):
            yield f"{name} has hooks, which would not run"


def _position_differences(template: CompatMADFormer, module: nn.Module) -> Iterator[str]:
    config = template.config
    orders = {
        "position_ids_precompute": token_positions(config),
        "text_position_ids": torch.arange(config.text_length)[None],
    }
    for name, expected in orders.items():
        positions = getattr(module, name, None)
        if positions is not None and not torch.equal(positions.cpu(), expected):
            yield f"{name} numbers the tokens in another order"
    if config.text is None:
        return
    for name in madformer_imagenet.other_frequencies(module.named_buffers(), config):
        yield f"{name} has other frequencies than those of text_rope.base={config.text.rope_theta:g}"
