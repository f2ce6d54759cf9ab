"""Attention under a layout in plain PyTorch: over the dense mask, and decomposed into dense calls of SDPA.

Shape legend: B batch, H heads, L tokens of the packed streams, D head dim, M image blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.kernels.block_causal_attention.layout import BlockLayout, Gather

# Up to this many keys one masked call costs less than one small call for each block.
# (CPU, 64 images, 48 clean and 64 noise tokens: a training step 18 % faster.)
MASKED_KEY_LENGTH = 256


def block_causal_attention_ref(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, over the dense mask; in float64 they are the oracle.

    Halves are computed in float32, as SDPA's own reference does. Memory is quadratic in the length.
    """
    scale = 1 / math.sqrt(q_BHLD.shape[-1]) if scale is None else scale
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_BHLD, k_BHLD, v_BHLD))
    scores_BHLL = (q @ k.mT * scale).masked_fill(~layout.dense_mask(q.device), float("-inf"))
    return (scores_BHLL.softmax(-1) @ v).to(q_BHLD.dtype), scores_BHLL.detach().logsumexp(-1)


def block_causal_attention_sdpa(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, scale: float
) -> Tensor:
    """Dense attention of every block to just what it may see, or one masked call where all is short."""
    q, k, v = q_BHLD, k_BHLD, v_BHLD
    alike = not layout.cross_block and layout.text_length == 0
    if layout.key_length <= MASKED_KEY_LENGTH and not alike:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask(q.device), scale=scale)
    text = layout.text_query_length
    parts = []
    if text:
        text_q, text_k, text_v = (x[:, :, :text] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(text_q, text_k, text_v, is_causal=True, scale=scale))
    if layout.query_blocks:
        attend = _block_by_block if layout.cross_block else _blocks_as_batch
        parts.append(attend(q[:, :, text:], k, v, layout, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _blocks_as_batch(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    """Blocks that do not see each other have equally many keys."""

    def blocks(x_BHLD: Tensor) -> Tensor:
        return x_BHLD.unflatten(2, (-1, layout.block_size)).transpose(1, 2)

    def keys(x_BHLD: Tensor) -> Tensor:
        own_BMHLD = blocks(x_BHLD[:, :, layout.key_length - q.shape[2] :])
        if layout.text_length == 0:
            return own_BMHLD
        text = x_BHLD[:, None, :, : layout.text_length].expand(-1, own_BMHLD.shape[1], -1, -1, -1)
        return torch.cat((text, own_BMHLD), dim=3)

    batch_q, batch_k, batch_v = (x.flatten(0, 1) for x in (blocks(q), keys(k), keys(v)))
    attended = F.scaled_dot_product_attention(batch_q, batch_k, batch_v, scale=scale)
    return attended.unflatten(0, (q.shape[0], -1)).transpose(1, 2).flatten(2, 3)


def _block_by_block(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float) -> Tensor:
    ranges = tuple(tuple(own) for own in layout.key_ranges())
    keys, values = (Gather.apply(x, ranges, 2) for x in (k, v))
    blocks = zip(q.split(layout.block_size, dim=2), keys, values, strict=True)
    # Over (B, L, H, D) memory, as SDPA gives each part, so that joining the heads of a token costs no copy.
    parts = [F.scaled_dot_product_attention(*block, scale=scale).transpose(1, 2) for block in blocks]
    return torch.cat(parts, dim=1).transpose(1, 2)
