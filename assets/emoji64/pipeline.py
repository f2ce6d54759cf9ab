"""Lets diffusers find the pipeline: DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline")."""

from madformer import MADFormerPipeline

__all__ = ["MADFormerPipeline"]
