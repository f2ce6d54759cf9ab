"""One Transformer layer: a tower of weights per stream, joined by attention.

Shape legend: B batch, L tokens, C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madformer.config import MADFormerConfig
from madformer.model.rope import RotaryEmbedding2D

Streams = dict[str, Tensor]
"""Tensors by stream name; ``clean`` before ``noise``."""


class Attention(Protocol):
    """How a layer's queries meet its keys. The model brings the training mask, the engine its cache.

    Takes and returns ``(B, H, L, D)`` by stream; streams without queries are absent from the result.
    """

    def __call__(self, queries: Streams, keys: Streams, values: Streams) -> Streams: ...


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension in fp32, as Llama's; the result has the input's dtype."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        # half the passes over memory of F.rms_norm on a CPU, where that is no fused kernel
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        return (x * scale * self.weight).to(x.dtype)


class SwiGLU(nn.Module):
    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Tower(nn.Module):
    """The weights that one stream passes in one layer."""

    # The released code leaves the per-head norms at their own default, whatever the model's epsilon.
    QK_NORM_EPS = 1e-6

    def __init__(self, config: MADFormerConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.input_norm = RMSNorm(hidden, eps=config.norm_eps)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = RMSNorm(self.head_dim, eps=self.QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=self.QK_NORM_EPS) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden, hidden)
        self.post_attention_norm = RMSNorm(hidden, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def query_key_value(self, x_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._heads(self.qkv(self.input_norm(x_BLC)), 3)
        return self.q_norm(q), self.k_norm(k), v

    def key_value(self, x_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values alone, for a stream whose own output nobody reads."""
        hidden = x_BLC.shape[-1]
        k, v = self._heads(F.linear(self.input_norm(x_BLC), self.qkv.weight[hidden:], self.qkv.bias[hidden:]), 2)
        return self.k_norm(k), v

    def _heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        return packed.unflatten(-1, (parts, -1, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def output(self, x_BLC: Tensor, attended_BHLD: Tensor) -> Tensor:
        """Both residual branches: the projected attention, then the MLP."""
        x = x_BLC + self.proj(attended_BHLD.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_norm(x))


class TransformerLayer(nn.Module):
    """Towers by stream name; with shared towers both streams pass the one named ``image``."""

    def __init__(self, config: MADFormerConfig, streams: Collection[str]) -> None:
        super().__init__()
        self.shared = config.shared_towers
        names = ["image"] if self.shared else streams
        self.towers = nn.ModuleDict({name: Tower(config) for name in names})

    def tower(self, stream: str) -> Tower:
        tower = self.towers["image" if self.shared else stream]
        assert isinstance(tower, Tower)
        return tower

    def forward(
        self,
        streams: Streams,
        rope: RotaryEmbedding2D,
        tables: Mapping[str, tuple[Tensor, Tensor]],
        attention: Attention,
        outputs: Collection[str],
    ) -> Streams:
        """Pass ``streams`` and return those named in ``outputs``; the others give keys and values only.

        Args:
            streams: ``(B, L, C)`` by name.
            tables: cosines and sines by stream name, for its tokens.
        """
        queries: Streams = {}
        keys: Streams = {}
        values: Streams = {}
        for name, x in streams.items():
            if name in outputs:
                q, keys[name], values[name] = self.tower(name).query_key_value(x)
                queries[name] = rope(q, tables[name])
            else:
                keys[name], values[name] = self.tower(name).key_value(x)
            keys[name] = rope(keys[name], tables[name])
        attended = attention(queries, keys, values)
        return {name: self.tower(name).output(streams[name], attended[name]) for name in queries}
