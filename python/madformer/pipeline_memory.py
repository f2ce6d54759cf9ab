"""diffusers' ways to spend less memory: which work here, and why others do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline


class OffloadingPipeline(DiffusionPipeline):
    """Offloading of whole models, tiles and slices of the autoencoder."""

    model_cpu_offload_seq = "transformer->vae"

    def enable_sequential_cpu_offload(self, *_: Any, **__: Any) -> None:
        """Refused: the sampler reads weights where they are, between calls of the modules that hold them.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "enable_sequential_cpu_offload has no place here, since sampling reads weights outside of their modules' "
            "calls: use enable_model_cpu_offload or enable_group_offload"
        )

    @contextlib.contextmanager
    def _onloaded(self) -> Iterator[None]:
        """The transformer on the device that it is to compute on, where ``enable_model_cpu_offload`` keeps it away.

        Raises:
            ValueError: hooks of accelerate that move its parts one by one.
        """
        hook = getattr(self.transformer, "_hf_hook", None)
        if getattr(hook, "offload", False) or any(
            getattr(getattr(module, "_hf_hook", None), "offload", False) for module in self.transformer.modules()
        ):
            self.enable_sequential_cpu_offload()
        try:
            if hook is not None:
                # diffusers' hook waits for `forward`, and sampling calls the parts
                hook.pre_forward(self.transformer)
            yield
        finally:
            self.maybe_free_model_hooks()

    def enable_vae_tiling(self) -> None:
        """Decode large pictures in overlapping tiles; see :func:`madformer.vae.set_tile`."""
        self._of_vae("enable_tiling")

    def disable_vae_tiling(self) -> None:
        self._of_vae("disable_tiling")

    def enable_vae_slicing(self) -> None:
        """Decode pictures one by one."""
        self._of_vae("enable_slicing")

    def disable_vae_slicing(self) -> None:
        self._of_vae("disable_slicing")

    def _of_vae(self, method: str) -> None:
        if not hasattr(self.vae, method):
            raise ValueError(f"{type(self.vae).__name__} as the autoencoder has no {method}")
        getattr(self.vae, method)()
