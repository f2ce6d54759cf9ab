"""LoRA for the pipeline: diffusers' own loader for pipelines whose only adapted part is ``transformer``."""

from __future__ import annotations

from diffusers.loaders import SanaLoraLoaderMixin


class LoraLoaderMixin(SanaLoraLoaderMixin):
    """``load_lora_weights``, ``save_lora_weights``, ``set_adapters``, ``fuse_lora`` and the rest, for the transformer.

    Adapters are of ``peft``, on any linear layer of the model: those of attention and MLP are
    :data:`madformer.model.lora.TARGETS`. Files are diffusers': ``pytorch_lora_weights.safetensors``.
    """
