"""Attention over the text, clean and noise streams of all blocks at once: the training mask, without a mask.

Shape legend: B batch, H heads, L tokens of the packed streams, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from madformer.kernels import dispatch
from madformer.kernels.block_causal_attention.compiled import block_causal_attention_cpp
from madformer.kernels.block_causal_attention.layout import BlockLayout
from madformer.kernels.block_causal_attention.op import MAX_HEAD_DIM as MAX_TRITON_HEAD_DIM
from madformer.kernels.block_causal_attention.op import block_causal_attention_triton
from madformer.kernels.block_causal_attention.peers import (
    block_causal_attention_flash_attn,
    block_causal_attention_flex,
    block_causal_attention_xformers,
)
from madformer.kernels.block_causal_attention.reference import block_causal_attention_ref, block_causal_attention_sdpa
from madformer.kernels.checks import DTYPES, check_device, check_floating
from madformer.kernels.plans import once_a_kind, plain_kind

__all__ = ["BlockLayout", "block_causal_attention"]

OP = "block_causal_attention"
MAX_HEAD_DIM = 256

_DTYPES = {
    "triton": DTYPES,
    "cpp": DTYPES,
    "sdpa": (*DTYPES, torch.float64),
    "flex": DTYPES,
    "flash_attn": (torch.bfloat16, torch.float16),
    "xformers": DTYPES,
    "reference": (*DTYPES, torch.float64),
}
_GIVE_LSE = ("triton", "cpp", "flex", "flash_attn", "reference")

dispatch.register(OP, "reference")
dispatch.register(OP, "triton", auto=("cuda",))
dispatch.register(OP, "cpp", ("cpu",), kernel="block_causal_attention_cpp")
dispatch.register(OP, "sdpa")
dispatch.register(OP, "flex", ("cpu", "cuda"), auto=())
dispatch.register(OP, "flash_attn", ("cuda",), auto=())
dispatch.register(OP, "xformers", ("cuda",), auto=())


@overload
def block_causal_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, *,
    scale: float | None = None, return_lse: Literal[False] = False, backend: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def block_causal_attention(
    q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, layout: BlockLayout, *,
    scale: float | None = None, return_lse: Literal[True], backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def block_causal_attention(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` under the mask of ``layout``; differentiable in q, k and v.

    Args:
        q_BHLD: ``(B, H, layout.query_length, D)`` of float32, bfloat16, float16, or float64 for ``sdpa`` and
            ``reference``; D at most 256. Autocast casts all three as it does for SDPA.
        k_BHLD, v_BHLD: ``(B, H, layout.key_length, D)`` of the same dtype and on the same device. Any strides.
        layout: who attends to whom.
        scale: of the scores; ``1 / sqrt(D)`` if None.
        return_lse: also return the natural logarithm of every query's sum of exponentiated scores.
        backend: ``"auto"``, ``"triton"``, ``"cpp"``, ``"sdpa"``, ``"flex"`` (on a CPU without gradients),
            ``"flash_attn"`` (halves only), ``"xformers"`` or ``"reference"``. ``"auto"`` takes Triton on CUDA, C++ on
            CPUs where it is built, SDPA elsewhere, and what they cannot give (float64, heads that are too wide for
            Triton, the log-sum-exp) from SDPA and the reference.

    Returns:
        ``(B, H, layout.query_length, D)`` in the dtype of q; with ``return_lse`` also ``(B, H, layout.query_length)``
        of float32 (float64 for float64), through which no gradient flows.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend is unknown or gives no
            log-sum-exp.
        RuntimeError: the backend that was asked for cannot run here.
    """
    device_type = q_BHLD.device.type
    if _has_autocast(device_type) and torch.is_autocast_enabled(device_type):
        q, k, v = (_autocast(x, torch.get_autocast_dtype(device_type)) for x in (q_BHLD, k_BHLD, v_BHLD))
        with torch.autocast(device_type, enabled=False):
            return _attend(q, k, v, layout, scale, return_lse, backend)
    return _attend(q_BHLD, k_BHLD, v_BHLD, layout, scale, return_lse, backend)


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    """In a function of its own: Dynamo cannot trace torch's before 2.13."""
    return torch.amp.is_autocast_available(device_type)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast leaves float64 and integers alone."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None, return_lse: bool, backend: str
) -> Tensor | tuple[Tensor, Tensor]:
    is_ours = backend in (dispatch.AUTO, "triton")
    kind = plain_kind((q, k, v, layout, scale, return_lse, backend)) if is_ours else None
    chosen = _choose(kind, q, k, v, layout, scale, return_lse, backend)
    if chosen == "cpp" and backend == dispatch.AUTO and not return_lse and _sdpa_is_faster(q, k, v):
        chosen = "sdpa"
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lse: Tensor | None
    if q.numel() == 0:
        out, lse = q.clone(), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    elif chosen == "triton":
        out, lse = block_causal_attention_triton(q, k, v, layout, scale, return_lse, kind=kind)
    else:
        out, lse = _run(chosen, q, k, v, layout, scale, return_lse)
    return out if lse is None or not return_lse else (out, lse)


@once_a_kind
def _choose(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float | None, return_lse: bool, backend: str
) -> str:
    """The backend that runs these, where they can be run."""
    _check(q, k, v, layout)
    chosen = dispatch.resolve(OP, backend, q.device)
    if backend == dispatch.AUTO and not _can(chosen, q, scale, return_lse):
        chosen = "reference" if return_lse else "sdpa"
    check_floating("q", q, _DTYPES[chosen])
    if return_lse and chosen not in _GIVE_LSE:
        raise ValueError(f"return_lse=True: backend={chosen!r} gives none, only {', '.join(_GIVE_LSE)} do")
    return chosen


def _can(backend: str, q: Tensor, scale: float | None, return_lse: bool) -> bool:
    """Whether ``auto`` may leave a call to a backend: ours in Triton has limits that no other has."""
    if q.dtype not in _DTYPES[backend] or (return_lse and backend not in _GIVE_LSE):
        return False
    return backend != "triton" or (q.shape[-1] <= MAX_TRITON_HEAD_DIM and (scale is None or scale > 0))


def _sdpa_is_faster(*tensors: Tensor) -> bool:
    """Where no gradient is asked for PyTorch multiplies halves as such, and C++ as fp32."""
    return tensors[0].dtype != torch.float32 and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    match backend:
        case "cpp":
            return block_causal_attention_cpp(q, k, v, layout, scale)
        case "sdpa":
            return block_causal_attention_sdpa(q, k, v, layout, scale), None
        case "flex":
            return block_causal_attention_flex(q, k, v, layout, scale)
        case "flash_attn":
            return block_causal_attention_flash_attn(q, k, v, layout, scale, return_lse)
        case "xformers":
            return block_causal_attention_xformers(q, k, v, layout, scale), None
        case _:
            return block_causal_attention_ref(q, k, v, layout, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> None:
    lengths = {"q": (q, layout.query_length), "k": (k, layout.key_length), "v": (v, layout.key_length)}
    for name, (tensor, length) in lengths.items():
        if tensor.ndim != 4 or tensor.shape[2] != length:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {layout} needs (B, H, {length}, D)")
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {tensor.shape[3]}; 1 to {MAX_HEAD_DIM} are possible")
        if (tensor.shape[:2], tensor.shape[3]) != (q.shape[:2], q.shape[3]):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its B, H and D must be q's {tuple(q.shape)}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        check_device(name, tensor, q.device)
