"""Parts of one network under two sets of names.

A drop-in's parts hang under their released names, and its native network runs them under its own. :class:`Container`
keeps the two alike, whatever is put in a part's place and on whichever side: an adapter, a quantised layer, a new norm.

Shape legend, in the released letters: N images, T blocks, B latents or tokens of a block, C channels; L latents of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine.options import SamplingOptions
from madformer.engine.sampler import Sampler
from madformer.model import MADFormer as NativeMADFormer


class Names(nn.Module):
    """Holds parts under their released names. It is never called: the native network calls the parts."""


def names(**parts: nn.Module) -> Names:
    """Such a module, with its parts in this order."""
    module = Names()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def reorder(module: nn.Module, *names: str) -> nn.Module:
    """Move these children to the end, in this order: an optimiser numbers parameters in that of registration."""
    for name in names:
        module._modules[name] = module._modules.pop(name)
    return module


@dataclass
class Place:
    """Where a native network has a part; ``agreed`` is what both sides had when they were compared last."""

    owner: nn.Module
    name: str
    agreed: nn.Module | None

    def settle(self, siblings: dict[str, nn.Module | None], name: str, path: str) -> None:
        """Put what is new, here or among the ``siblings``, on the other side."""
        released, native = siblings.get(name), self.owner._modules.get(self.name)
        if released is not native:
            if released is None or (released is not self.agreed and native is not self.agreed):
                what = "was removed" if released is None else "was replaced, and so was the native model's"
                raise ValueError(f"{path} {what}: the network cannot run")
            if native is self.agreed:
                self.owner._modules[self.name] = released
            else:
                siblings[name] = released = native
        self.agreed = released


@dataclass
class Container:
    """A module that is not called itself: its name and a dot, its class, how many children it has, and which."""

    path: str
    kind: type[nn.Module]
    count: int
    containers: dict[str, Container] = field(default_factory=dict)
    parts: dict[str, list[Place]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, pairs: Iterable[tuple[str, nn.Module, str]], idle: Iterable[str] = ()) -> Container:
        """The root of the parts that a drop-in and its native networks have in common.

        Args:
            model: the drop-in.
            pairs: a part's name in it, a network, and the name there. What ``model`` has is put there.
            idle: modules of it that are not called, and hold no part.
        """
        root = cls("", type(model), len(model._modules))
        for released, network, native in pairs:
            prefix, _, name = released.rpartition(".")
            owner, _, last = native.rpartition(".")
            part = model.get_submodule(released)
            place = Place(network.get_submodule(owner), last, part)
            place.owner._modules[last] = part
            root.within(model, prefix).parts.setdefault(name, []).append(place)
        for released in idle:
            root.within(model, released)
        return root

    def within(self, module: nn.Module, path: str) -> Container:
        """The one at a path below ``module``, which is made where there is none."""
        container = self
        for step in path.split(".") if path else ():
            module = module.get_submodule(step)
            made = Container(f"{container.path}{step}.", type(module), len(module._modules))
            container = container.containers.setdefault(step, made)
        return container

    def follow(self, module: nn.Module, *, check: bool) -> None:
        """Bring both sides of all parts below up to date.

        Args:
            check: whether everything that hangs under a released name is run.

        Raises:
            ValueError: a part was removed, or replaced on both sides; with ``check`` also a module that holds parts
                was replaced or has hooks, neither of which would run.
        """
        siblings = module._modules
        for name, places in self.parts.items():
            for place in places:
                part = place.agreed
                if siblings.get(name) is not part or place.owner._modules.get(place.name) is not part:
                    place.settle(siblings, name, f"{self.path}{name}")
        for name, container in self.containers.items():
            child = siblings.get(name)
            if check:
                container.check(child)
            if isinstance(child, nn.Module):
                container.follow(child, check=check)

    def check(self, module: nn.Module | None) -> None:
        """Raises ``ValueError`` where it is not as it was made, or would do more if it were called."""
        if module is None or type(module) is not self.kind:
            change = "was removed" if module is None else f"was replaced by a {type(module).__name__}"
        elif len(module._modules) != self.count:
            change = f"has {len(module._modules)} parts and not {self.count}"
        elif is_hooked(module):
            change = "has hooks or a forward of its own"
        else:
            return
        raise ValueError(f"{self.path[:-1]} {change}, which would not run: the parts in it are called one by one")


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` does more than its class's ``forward``."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


class Released(nn.Module):
    """A drop-in: parts under released names, run by native networks that are no submodules of it."""

    def _share(
        self,
        networks: dict[str, NativeMADFormer],
        pairs: Iterable[tuple[str, nn.Module, str]],
        idle: Iterable[str] = (),
    ) -> None:
        # Not registered as submodules: parameters must appear once, under their released names.
        self.__dict__.update(networks=networks, parts=Container.of(self, pairs, idle))

    def _follow(self, *, check: bool = True) -> None:
        """Run what hangs under the released names now; see :meth:`Container.follow`."""
        self.__dict__["parts"].follow(self, check=check)

    def to_native(self) -> NativeMADFormer:
        """The native model; it shares this model's weights and parts, with whatever was put in a part's place.

        It is one object: a native model that was given out before is brought up to date by every call of ``forward``,
        ``sample`` or ``to_native``.

        Raises:
            ValueError: something was put under a released name that would not run; the message names it.
        """
        self._follow()
        native = self.__dict__["networks"]["native"]
        if native.device.type != "meta" and native.rope.cos.device != native.device:
            native.rope.to(native.device)
        return native

    @property
    def config(self) -> MADFormerConfig:
        return self.__dict__["networks"]["native"].config

    @property
    def _target(self) -> tuple[int, int, int]:
        """What a sample has besides its images: blocks, latents of a block (or tokens), and their numbers."""
        return self.config.num_blocks, self.config.latents_per_block, self.config.latent_channels

    def to_latents(self, tokens_NTBC: Tensor) -> Tensor:
        """Of what the released code draws, such as noise, the latents ``(N, T, L, channels)``: here the very same."""
        return tokens_NTBC

    def to_tokens(self, latents_NTLC: Tensor) -> Tensor:
        """Inverse of :meth:`to_latents`."""
        return latents_NTLC

    def _draw(
        self,
        scheduler: Any,
        num_inference_steps: int,
        target_shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
        prompt: Prompt | None = None,
        guidance: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """What the released samplers draw; ``options`` are :class:`Sampler`'s."""
        images, *shape = target_shape
        if tuple(shape) != self._target:
            raise ValueError(f"target_shape={tuple(target_shape)} must be (N, {', '.join(map(str, self._target))})")
        native = self.to_native()

        def noise(block: int) -> Tensor:
            size = (images, 1, *self._target[1:])
            return self.to_latents(randn_tensor(size, generator=generator, device=native.device, dtype=dtype))[:, 0]

        plan = Sampler(native, scheduler, **options).plan(images, SamplingOptions(num_inference_steps, guidance))
        return self.to_tokens(plan.run(noise, prompt, generator=generator).to(dtype))

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self._follow(check=False)
        return super().named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._follow(check=False)
        return super().state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._follow(check=False)
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # PyTorch's own for parametrized modules asks for no state
        self._follow(check=False)
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._follow(check=False)
        super()._apply(fn, recurse)
        if recurse:
            self.__dict__["networks"]["native"].rope._apply(fn)
        return self

    def train(self, mode: bool = True) -> Self:
        for network in self.__dict__["networks"].values():
            network.train(mode)
        return super().train(mode)
