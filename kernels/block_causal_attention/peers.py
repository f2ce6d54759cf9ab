"""Attention under a layout by other libraries: FlexAttention, flash-attn, xFormers.

Shape legend: B batch, H heads, L tokens of the packed streams, D head dim, T tokens of all sequences of a call.

FlexAttention knows arbitrary masks. The other two know sequences of different lengths: every image block of the
queries is one, with its keys gathered, and the text, which is causal, takes a call of its own. Dense calls for one
block after the other would gather fewer keys, but at batch 1 each fills a fraction of a GPU.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from madformer.kernels.block_causal_attention.layout import BlockLayout, Gather


def block_causal_attention_flex(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """FlexAttention: compiled on CUDA, unfused and forward-only on the CPU."""
    on_cpu = q_BHLD.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHLD, k_BHLD, v_BHLD)):
        raise RuntimeError("backend='flex' cannot compute gradients on cpu: FlexAttention has no backward there")
    attend: Any = flex_attention if on_cpu else _compiled_flex_attention()
    # It refuses tensors that require a gradient even where none is recorded.
    tensors = [x.detach() if on_cpu else x for x in (q_BHLD, k_BHLD, v_BHLD)]
    mask = _block_mask(layout, q_BHLD.device)
    out, aux = attend(*tensors, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse.detach()


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # Whole, so that too many recompilations are an error: without it they would leave the quadratic, unfused code.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


# Tensors made in inference mode could not be saved for a later backward. (In a graph of torch.compile the mask is
# part of the graph, whatever the cache holds: Dynamo can take neither a BlockMask nor a layout for a constant.)
@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _block_mask(layout: BlockLayout, device: torch.device) -> BlockMask:
    return create_block_mask(mask_mod(layout), None, None, layout.query_length, layout.key_length, device)


def mask_mod(layout: BlockLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The layout's mask as FlexAttention takes it: a function of the indices of a query and a key."""
    size, text, clean = layout.block_size, layout.text_length, layout.clean_blocks
    text_queries = layout.text_query_length
    keys_before_images = text + (0 if layout.clean_queries else layout.clean_length)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # The query's place among the keys.
        place = torch.where(query < text_queries, query, query - text_queries + keys_before_images)
        block = (place - text) // size
        own = (key >= text + block * size) & (key < text + (block + 1) * size)
        seen = torch.zeros_like(block)
        if layout.cross_block:
            seen = torch.where(block < clean, block, block - clean)
            seen = seen.clamp(max=clean) if clean else seen
        image = (key < text + seen * size) | own
        return torch.where(query < text_queries, key <= query, image)

    return attends


@dataclass(frozen=True)
class Sequences:
    """Lengths of the sequences in one call, in order."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool = False


# (q_THD, k_THD, v_THD, sequences, scale) -> out_THD, lse_HT where it was asked for
Attend = Callable[[Tensor, Tensor, Tensor, Sequences, float], tuple[Tensor, Tensor | None]]


def block_causal_attention_flash_attn(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """flash-attn 2, or 4 where only that is installed, in one or two calls."""
    attend = functools.partial(_flash_attn, return_lse=return_lse)
    return _by_sequences(attend, q_BHLD, k_BHLD, v_BHLD, layout, scale)


def block_causal_attention_xformers(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, scale: float
) -> Tensor:
    """xFormers' memory-efficient attention in one or two calls."""
    return _by_sequences(_xformers, q_BHLD, k_BHLD, v_BHLD, layout, scale)[0]


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, *, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    # Version 4 alone leaves a bare namespace where version 2 has its functions.
    is_version_2 = hasattr(_load("flash_attn", "flash_attn"), "flash_attn_varlen_func")
    attend = _load("flash_attn", "flash_attn" if is_version_2 else "flash_attn.cute", "flash_attn_varlen_func")
    result = attend(
        q,
        k,
        v,
        cu_seqlens_q=_offsets(sequences.queries, q.device),
        cu_seqlens_k=_offsets(sequences.keys, q.device),
        max_seqlen_q=max(sequences.queries),
        max_seqlen_k=max(sequences.keys),
        softmax_scale=scale,
        causal=sequences.causal,
        **{"return_attn_probs" if is_version_2 else "return_lse": return_lse},
    )
    out, lse, *_ = result if isinstance(result, tuple) else (result, None)
    return out, lse.detach() if return_lse and lse is not None else None


def _xformers(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, None]:
    attend = _load("xformers", "xformers.ops", "memory_efficient_attention")
    bias = _block_diagonal_bias(sequences, q.device)
    # A batch of one: its sequences lie one after the other.
    out = attend(q[None], k[None], v[None], attn_bias=bias, scale=scale)
    return out[0], None


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _block_diagonal_bias(sequences: Sequences, device: torch.device) -> Any:
    biases = _load("xformers", "xformers.ops.fmha.attn_bias")
    kind = biases.BlockDiagonalCausalMask if sequences.causal else biases.BlockDiagonalMask
    return kind.from_seqlens(sequences.queries, sequences.keys, device=device)


def _load(backend: str, module: str, name: str | None = None) -> Any:
    """An optional module or its attribute: what is installed may still not fit this PyTorch or this CUDA."""
    try:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name)
    except Exception as error:
        why = " ".join(str(error).split())
        raise RuntimeError(f"backend={backend!r} cannot run: {module} does not load: {why}") from error


def _by_sequences(
    attend: Attend, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, scale: float
) -> tuple[Tensor, Tensor | None]:
    batch, text = q_BHLD.shape[0], layout.text_query_length
    q, k, v = (x.transpose(1, 2) for x in (q_BHLD, k_BHLD, v_BHLD))
    calls = []
    if text:
        square = Sequences((text,) * batch, (text,) * batch, causal=True)
        calls.append((q[:, :text], k[:, :text], v[:, :text], square))
    if layout.query_blocks:
        ranges = list(layout.key_ranges())
        lengths = tuple(sum(stop - start for start, stop in own) for own in ranges)
        sequences = Sequences((layout.block_size,) * len(ranges) * batch, lengths * batch)
        joined = _join(list(itertools.chain.from_iterable(ranges)))
        calls.append((q[:, text:], _gather(k, joined), _gather(v, joined), sequences))
    outs, lses = [], []
    for q, k, v, sequences in calls:
        out_THD, lse_HT = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), sequences, scale)
        outs.append(out_THD.unflatten(0, (batch, -1)).transpose(1, 2))
        if lse_HT is not None:
            lses.append(lse_HT.unflatten(1, (batch, -1)).transpose(0, 1))
    out_BHLD = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out_BHLD, torch.cat(lses, dim=2) if lses else None


def _join(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same indices in the same order, in as few ranges as possible."""
    joined = [ranges[0]]
    for start, stop in ranges[1:]:
        if start == joined[-1][1]:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _gather(x_BLHD: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    return Gather.apply(x_BLHD, (ranges,), 1)[0]
