"""Fewer launches of a tower's MLP in sampling: gate and up are one product, and the last product adds the residual.

A GPU that draws one image has 256 rows to multiply. Gate and up are 64 tiles of 128 x 128 then, each half of what an
H200 has multiprocessors for; together they fill it once. Of a layer's twelve launches ten are left.

Nothing is kept of the weights. Those of gate and up lie one behind the other in memory, and so are one matrix, which is
looked at anew in every call: as parameters of their layers they can be written to as ever. Where they do not lie so any
more (replaced, moved, cast), and where a layer is more than its weights (hooks, adapters), it is called as it stands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.engine.structure import plain, process_is_plain
from madformer.kernels import swiglu
from madformer.model.layer import RMSNorm, SwiGLU, Tower
from madformer.model.plain import is_plain


def join(model: nn.Module) -> None:
    """Lays the weights of gate and up together in every tower of ``model``, whose parameters become others."""
    for tower in model.modules():
        if isinstance(tower, Tower) and type(tower.mlp) is SwiGLU:
            _lay_together(tower.mlp.gate_proj, tower.mlp.up_proj)
            tower.mlp.__class__ = JoinedSwiGLU
            if type(tower) is Tower:
                tower.__class__ = JoinedTower


def disjoin(model: nn.Module) -> None:
    """Makes the towers of ``model`` those that :func:`join` found."""
    for module in model.modules():
        if (found := _FOUND.get(type(module))) is not None:
            module.__class__ = found


def _lay_together(*layers: nn.Linear) -> None:
    if not all(_is_linear(layer) for layer in layers):
        return
    for name in ("weight", "bias"):
        tensors = [getattr(layer, name) for layer in layers]
        if None not in tensors and len({(x.dtype, x.device, x.shape[1:]) for x in tensors}) == 1:
            together = torch.cat([x.detach() for x in tensors])
            for layer, rows in zip(layers, together.split([len(x) for x in tensors]), strict=True):
                setattr(layer, name, nn.Parameter(rows, requires_grad=False))


def _is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and plain(layer)


def together(first: Tensor, second: Tensor) -> Tensor | None:
    """Both tensors as one along their first dimension, sharing their memory; None where they do not lie so."""
    follows = (
        first.untyped_storage()._cdata == second.untyped_storage()._cdata
        and first.storage_offset() + first.numel() == second.storage_offset()
        and first.is_contiguous()
        and second.is_contiguous()
        and (first.dtype, first.shape[1:]) == (second.dtype, second.shape[1:])
    )
    if not follows:
        return None
    shape = (len(first) + len(second), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


def _may_join() -> bool:
    """Whether calls are computed at once, for their results alone, by PyTorch's own layers."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and process_is_plain()


class JoinedSwiGLU(SwiGLU):
    """``SwiGLU`` whose gate and up are one product where they can be."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._hidden(x) if _may_join() else None
        return super().forward(x) if hidden is None else self.down_proj(hidden)

    def add_to(self, total: Tensor, x: Tensor) -> bool:
        """Adds the result for ``x`` to ``total``, rounding once, where that is the last product's to do."""
        down, device_type = self.down_proj, x.device.type
        if not (_may_join() and plain(self) and _is_linear(down) and down.bias is None and total.is_contiguous()):
            return False
        if torch.is_autocast_enabled(device_type) or not x.dtype == total.dtype == down.weight.dtype:
            return False
        hidden = self._hidden(x)
        if hidden is None:
            return False
        total.flatten(0, -2).addmm_(hidden.flatten(0, -2), down.weight.t())
        return True

    def _hidden(self, x: Tensor) -> Tensor | None:
        layers = gate, up = self.gate_proj, self.up_proj
        if not all(map(_is_linear, layers)):
            return None
        weight = together(gate.weight, up.weight)
        bias = None if gate.bias is None or up.bias is None else together(gate.bias, up.bias)
        if weight is None or any(layer.bias is not None for layer in layers) != (bias is not None):
            return None
        gate_x, up_x = F.linear(x, weight, bias).split([gate.out_features, up.out_features], dim=-1)
        return swiglu(gate_x, up_x, backend=self.backend)


class JoinedTower(Tower):
    """A tower whose MLP is a :class:`JoinedSwiGLU`."""

    def with_mlp(self, x_BLC: Tensor, normed_BLC: Tensor) -> Tensor:
        mlp = self.mlp
        # A norm that is more than its weights may have kept its input.
        if type(mlp) is JoinedSwiGLU and is_plain(self.post_attention_norm, RMSNorm) and mlp.add_to(x_BLC, normed_BLC):
            return x_BLC
        return super().with_mlp(x_BLC, normed_BLC)


_FOUND: dict[type[nn.Module], type[nn.Module]] = {JoinedSwiGLU: SwiGLU, JoinedTower: Tower}
