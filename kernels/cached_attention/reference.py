"""Attention to a cached prefix and the own block in plain PyTorch: the oracle, and what runs where Triton does not.

Shape legend: B batch, H heads, L queries, N own keys, R rows of the cache, S their capacity, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cached_attention_ref(
    q_BHLD: Tensor,
    k_cache_RHSD: Tensor,
    v_cache_RHSD: Tensor,
    lengths_B: Tensor,
    k_BHND: Tensor | None = None,
    v_BHND: Tensor | None = None,
    *,
    rows_B: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`~madformer.kernels.cached_attention.cached_attention` in the dtype of its arguments.

    Like the kernel it never reads ``lengths_B`` on the host, so it works through the whole capacity. Who knows the
    length on the host (a loop that is not captured) does better with a slice of the cache.
    """
    k_cache_BHSD, v_cache_BHSD = k_cache_RHSD, v_cache_RHSD
    if rows_B is not None:
        outside = (rows_B < 0) | (rows_B >= len(k_cache_RHSD))
        lengths_B, rows_B = lengths_B.masked_fill(outside, 0), rows_B.masked_fill(outside, 0)
        k_cache_BHSD, v_cache_BHSD = k_cache_RHSD[rows_B], v_cache_RHSD[rows_B]
    cached_BS = torch.arange(k_cache_BHSD.shape[2], device=lengths_B.device) < lengths_B[:, None]
    # Neither a score nor a value may come from memory that nobody wrote: 0 * NaN is NaN.
    unwritten = ~cached_BS[:, None, :, None]
    k, v = k_cache_BHSD.masked_fill(unwritten, 0), v_cache_BHSD.masked_fill(unwritten, 0)
    attended = cached_BS
    if k_BHND is not None and v_BHND is not None:
        k, v = torch.cat((k, k_BHND), dim=2), torch.cat((v, v_BHND), dim=2)
        attended = F.pad(cached_BS, (0, k_BHND.shape[2]), value=True)
    nothing = ~attended.any(dim=1)[:, None]
    # A row without any key is not defined in every backend of PyTorch's: it attends to all, and is cleared.
    mask_B11S = (attended | nothing)[:, None, None]
    out = F.scaled_dot_product_attention(q_BHLD, k, v, attn_mask=mask_B11S, scale=scale)
    return out.masked_fill(nothing[:, None, None], 0)
