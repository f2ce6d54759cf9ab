"""The network: streams, towers, U-Net halves, and how they are saved."""

from madformer.model.madformer import MADFormer, MADFormerOutput

__all__ = ["MADFormer", "MADFormerOutput"]
