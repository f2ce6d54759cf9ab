"""One Transformer layer: a tower of weights per stream, joined by attention.

What is worth a kernel is an op of ``madformer.kernels``, one file each with its reference; the layer calls its public
function and knows no implementation. A new one is called here (CONTRIBUTING.md, "Add an op").

Shape legend: B batch, L tokens, C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.kernels import (
    BlockLayout,
    adaln,
    block_causal_attention,
    qk_norm_rope,
    qk_norm_rope_cached,
    rms_norm,
    swiglu,
)  # fmt: skip
from madformer.model.plain import cast, is_plain, projected
from madformer.model.rope import RotaryEmbedding

Streams = dict[str, Tensor]
"""Tensors by stream name, in the order ``text``, ``clean``, ``noise``."""

# The released code leaves the per-head norms at their own default, whatever the model's epsilon.
QK_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Projections:
    """What the towers of a layer project their streams to; per-head norm and rotation are still to come.

    Whoever attends does those, and so decides where queries, keys and values are put. Every list has one entry a
    stream, in the order of the streams.

    Attributes:
        qkv: ``(B, L, 3 * H * D)``; keys and values alone, ``(B, L, 2 * H * D)``, where nobody reads the output.
        q_weights, k_weights: of the per-head norms, None without them.
        tables: cosines and sines of the tokens.
        num_heads: H.
        axes: the pairing of rotated channels, see :func:`madformer.kernels.qk_norm_rope.qk_norm_rope`.
        backend: of the kernel.
    """

    qkv: list[Tensor]
    q_weights: list[Tensor | None]
    k_weights: list[Tensor | None]
    tables: list[tuple[Tensor, Tensor]]
    num_heads: int
    axes: int
    backend: str

    @property
    def _how(self) -> dict[str, Any]:
        return {"num_heads": self.num_heads, "axes": self.axes, "eps": QK_NORM_EPS, "backend": self.backend}

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all streams, joined along the tokens: ``(B, H, L, D)`` each."""
        cos, sin = ([table[part] for table in self.tables] for part in (0, 1))
        return qk_norm_rope(self.qkv, self.q_weights, self.k_weights, cos, sin, **self._how)

    def heads_into(
        self, k_cache_RHSD: Tensor, v_cache_RHSD: Tensor, positions_B: Tensor, rows_B: Tensor | None
    ) -> Tensor | None:
        """Writes keys and values of the one stream to the cache at ``positions_B``; returns the queries, if any.

        See :func:`madformer.kernels.qk_norm_rope.qk_norm_rope_cached`.
        """
        ((cos, sin),) = self.tables
        stream = self.qkv[0], self.q_weights[0], self.k_weights[0], cos, sin
        return qk_norm_rope_cached(*stream, k_cache_RHSD, v_cache_RHSD, positions_B, rows_B=rows_B, **self._how)


class Attention(Protocol):
    """How a layer's queries meet its keys. The model brings the training mask, the engine its cache.

    Returns ``(B, H, L, D)`` for the tokens of the streams that have queries, or None where none has.
    """

    def __call__(self, projections: Projections) -> Tensor | None: ...


@dataclass(frozen=True)
class Modulation:
    """Of one tower in one layer; each ``(B, C)``, or ``(B, M, C)`` with a row for each of M runs of tokens."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension in fp32, as Llama's; the result has the input's dtype."""

    eps: float
    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps, backend=self.backend)


def added(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual``, and that sum: by one kernel where that is all that the norm is."""
    if isinstance(norm, RMSNorm) and is_plain(norm, RMSNorm):
        return rms_norm(x, norm.weight, eps=norm.eps, residual=residual, backend=norm.backend)
    total = x + residual
    return norm(total), total


def modulated(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, by one kernel (:func:`madformer.kernels.adaln.adaln`) where it can be."""
    if isinstance(norm, RMSNorm) and is_plain(norm, RMSNorm):
        y = adaln(x, shift, scale, norm="rms", weight=norm.weight, eps=norm.eps, backend=norm.backend)
        assert isinstance(y, Tensor)
        return y
    return norm(x) * (1 + _for_tokens(scale, x)) + _for_tokens(shift, x)


def modulated_sum(
    norm: nn.Module, x: Tensor, residual: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`modulated` of ``residual + gate * x``, and that sum."""
    if isinstance(norm, RMSNorm) and is_plain(norm, RMSNorm):
        how: dict[str, Any] = {"norm": "rms", "weight": norm.weight, "eps": norm.eps, "backend": norm.backend}
        y, total = adaln(x, shift, scale, **how, residual=residual, gate=gate)
        return y, total
    total = residual + _for_tokens(gate, x) * x
    return modulated(norm, total, shift, scale), total


def _for_tokens(row: Tensor, x_BLC: Tensor) -> Tensor:
    """A row for each sample or for each run of its tokens, ``(B, C)`` or ``(B, M, C)``, as one for each token."""
    rows = row.view(len(x_BLC), -1, row.shape[-1])
    return rows.repeat_interleave(x_BLC.shape[1] // rows.shape[1], dim=1)


class SwiGLU(nn.Module):
    backend = "auto"

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), backend=self.backend))


class GELU(nn.Module):
    """Two linear layers about a GELU, in its approximation by a hyperbolic tangent."""

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class Tower(nn.Module):
    """The weights that one stream passes in one layer.

    Args:
        modulated: has AdaLN-Zero (arXiv:2212.09748).
    """

    def __init__(self, config: MADFormerConfig, *, modulated: bool = False) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.input_norm = RMSNorm(hidden, eps=config.norm_eps)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = RMSNorm(head_dim, eps=QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden, hidden)
        self.post_attention_norm = RMSNorm(hidden, eps=config.norm_eps)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.modulation = nn.Linear(hidden, 6 * hidden) if modulated else None

    def reset_modulation(self) -> None:
        """AdaLN-Zero: a layer begins as nothing, and learns to be something."""
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def modulate(self, vector: Tensor) -> Modulation:
        """What ``vector``, ``(B, C)`` or ``(B, M, C)``, makes of this tower."""
        assert self.modulation is not None
        return Modulation(*projected(self.modulation, vector).chunk(6, dim=-1))

    def query_key_value(self, x_BLC: Tensor, modulation: Modulation | None = None) -> Tensor:
        """Packed, ``(B, L, 3 * C)``."""
        if modulation is None:
            return self.qkv(self.input_norm(x_BLC))
        return self.qkv(modulated(self.input_norm, x_BLC, modulation.attention_shift, modulation.attention_scale))

    def key_value(self, x_BLC: Tensor) -> Tensor:
        """Keys and values alone, ``(B, L, 2 * C)``, for a stream whose own output nobody reads."""
        hidden, normed = x_BLC.shape[-1], self.input_norm(x_BLC)
        if not is_plain(self.qkv, nn.Linear) or type(self.qkv.weight) not in (nn.Parameter, Tensor):
            return self.qkv(normed)[..., hidden:]
        return F.linear(normed, self.qkv.weight[hidden:], self.qkv.bias[hidden:])

    @property
    def has_plain_head_norms(self) -> bool:
        """Whether the kernel that rotates may normalise as well, of the weights alone."""
        return all(
            is_plain(norm, nn.Identity) or (is_plain(norm, RMSNorm) and norm.eps == QK_NORM_EPS)
            for norm in (self.q_norm, self.k_norm)
        )

    def norm_heads(self, packed_BLC: Tensor, parts: int, num_heads: int) -> Tensor:
        """Packed projections after the per-head norms: three parts, or two without queries."""
        *queries, k, v = packed_BLC.unflatten(-1, (parts, num_heads, -1)).unbind(-3)
        return torch.stack((*(self.q_norm(q) for q in queries), self.k_norm(k), v), dim=-3).flatten(-3)

    def output(self, x_BLC: Tensor, attended_BHLD: Tensor, modulation: Modulation | None = None) -> Tensor:
        """Both residual branches: the projected attention, then the MLP."""
        branch = self.proj(attended_BHLD.transpose(1, 2).flatten(2))
        if modulation is None:
            normed, x = added(self.post_attention_norm, branch, x_BLC)
            return self.with_mlp(x, normed)
        gate, shift, scale = modulation.attention_gate, modulation.mlp_shift, modulation.mlp_scale
        normed, x = modulated_sum(self.post_attention_norm, branch, x_BLC, gate, shift, scale)
        gate, branch = modulation.mlp_gate, self.mlp(normed)
        if gate.dim() == 3 and gate.shape[1] == 1:
            return torch.addcmul(x, branch, gate)
        # a gate for each run of tokens
        gate = gate.view(len(x), -1, 1, x.shape[2])
        x, branch = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, branch))
        return torch.addcmul(x, branch, gate).flatten(1, 2)

    def with_mlp(self, x_BLC: Tensor, normed_BLC: Tensor) -> Tensor:
        """``x_BLC``, which a norm made and nobody else reads, and the MLP's result."""
        return x_BLC + self.mlp(normed_BLC)


class TransformerLayer(nn.Module):
    """Towers by stream name; with shared towers the image's streams pass the one named ``image``.

    Args:
        modulated: the noise stream's tower has AdaLN; a stream that shares it passes it without.
    """

    backend = "auto"

    def __init__(self, config: MADFormerConfig, streams: Collection[str], *, modulated: bool = False) -> None:
        super().__init__()
        self.shared, self.num_heads, self.modulated = config.shared_towers, config.num_heads, modulated
        # of streams that share a tower the noise stream comes last, and decides
        names = {self._tower_name(stream): modulated and stream == "noise" for stream in streams}
        self.towers = nn.ModuleDict({name: Tower(config, modulated=flag) for name, flag in names.items()})

    def _tower_name(self, stream: str) -> str:
        return "image" if self.shared and stream != "text" else stream

    def tower(self, stream: str) -> Tower:
        tower = self.towers[self._tower_name(stream)]
        assert isinstance(tower, Tower)
        return tower

    def forward(
        self,
        streams: Streams,
        rope: RotaryEmbedding,
        tables: Mapping[str, tuple[Tensor, Tensor]],
        attention: Attention,
        outputs: Collection[str],
        modulation: Tensor | None = None,
    ) -> Streams:
        """Pass ``streams`` and return those named in ``outputs``; the others give keys and values only.

        Args:
            streams: ``(B, L, C)`` by name.
            tables: cosines and sines by stream name, for its tokens.
            modulation: what the noise stream is modulated by where this layer does, ``(B, C)`` or ``(B, M, C)``.
        """
        towers = {name: self.tower(name) for name in streams}
        modulations: dict[str, Modulation] = {}
        if self.modulated and "noise" in streams:
            assert modulation is not None
            modulations["noise"] = towers["noise"].modulate(cast(modulation, streams["noise"].dtype))
        packed = [
            towers[name].query_key_value(x, modulations.get(name)) if name in outputs else towers[name].key_value(x)
            for name, x in streams.items()
        ]
        q_weights = [getattr(tower.q_norm, "weight", None) for tower in towers.values()]
        k_weights = [getattr(tower.k_norm, "weight", None) for tower in towers.values()]
        if not all(tower.has_plain_head_norms for tower in towers.values()):
            packed = [
                towers[name].norm_heads(x, 3 if name in outputs else 2, self.num_heads)
                for name, x in zip(streams, packed, strict=True)
            ]
            q_weights = k_weights = [None] * len(packed)
        rotation = [tables[name] for name in streams]
        projections = Projections(packed, q_weights, k_weights, rotation, self.num_heads, rope.axes, self.backend)
        attended = attention(projections)
        queried = [name for name in streams if name in outputs]
        if attended is None:
            return {}
        if len(queried) == 1:
            parts: Sequence[Tensor] = (attended,)
        else:
            parts = attended.split([streams[name].shape[1] for name in queried], dim=2)
        return {
            name: towers[name].output(streams[name], part, modulations.get(name))
            for name, part in zip(queried, parts, strict=True)
        }


def set_backend(module: nn.Module, backend: str) -> None:
    """Choose the implementation of every kernel but attention in ``module``."""
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = backend  # type: ignore[assignment]


def masked_attention(layout: BlockLayout, backend: str) -> Attention:
    """Attention over the packed streams under the training mask."""

    def attend(projections: Projections) -> Tensor:
        return block_causal_attention(*projections.heads(), layout, backend=backend)

    return attend
