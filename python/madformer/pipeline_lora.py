"""LoRA for the pipeline: diffusers' own loader for pipelines whose only adapted part is ``transformer``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from diffusers.loaders import SanaLoraLoaderMixin

from madformer.arguments import number

WEIGHTS = "pytorch_lora_weights.safetensors"


class LoraLoaderMixin(SanaLoraLoaderMixin):
    """``load_lora_weights``, ``save_lora_weights``, ``set_adapters``, ``fuse_lora`` and the rest, for the transformer.

    Adapters are of ``peft``, on any linear layer of the model: those of attention and MLP are
    :data:`madformer.model.lora.TARGETS`. Files are diffusers': ``pytorch_lora_weights.safetensors``.
    """

    def merge_lora(self, folder: str | Path, strength: float = 1.0) -> dict[str, Any]:
        """Put what the adapters of a folder change, ``strength`` times, into the transformer's weights.

        Returns:
            What says of a picture which they were: the folder's ``name``, ``strength`` and the first 16 hexadecimal
            digits of SHA-256 over the file, ``weights``.

        Raises:
            ValueError, OSError: there are none, or they are of another model; one line.
            ImportError: ``peft`` is not installed.
        """
        strength, file = number("strength", strength), Path(folder) / WEIGHTS
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {WEIGHTS}")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ImportError("LoRA needs peft: pip install 'madformer[lora]'") from error
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        try:
            self.load_lora_weights(str(folder), adapter_name="merged")
            found = "merged" in self.get_list_adapters().get("transformer", [])
        except Exception as error:
            # of many types, over several lines
            raise ValueError(f"{file} holds no adapters of this model: {' '.join(str(error).split())[:200]}") from error
        if not found:
            raise ValueError(f"{file} holds no adapters of this model")
        self.set_adapters("merged", strength)
        self.fuse_lora(adapter_names=["merged"])
        self.unload_lora_weights()
        return {"name": Path(folder).resolve().name, "strength": strength, "weights": digest}
