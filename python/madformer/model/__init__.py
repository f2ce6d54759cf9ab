"""The network: streams, towers, U-Net halves, and how they are saved."""

import diffusers

from madformer.model.madformer import MADFormer, MADFormerOutput

__all__ = ["MADFormer", "MADFormerOutput"]

# where diffusers.AutoModel and DiffusionPipeline look for the class that a config.json names
diffusers.MADFormer = MADFormer
