"""Makes Triton's interpreter right in bfloat16.

It holds bfloat16 as 16-bit integers and multiplies those in ``tl.dot``, and its cast from float32 truncates. Here dot
products are taken in float32, as matrix units accumulate, and casts round to the nearest even. Arithmetic on bfloat16
values stays wrong: kernels convert to float32 after a load. And it makes Triton 3.6's take a value for a number under
NumPy 2.4 and later, which convert no array of one element.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def install() -> None:
    """Patches the interpreter once; to be called before a kernel runs in it."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_madformer_bf16", False):
        return
    builder._madformer_bf16 = True
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_to_float32(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, precision: Any, max_imprecise: Any) -> Any:
        return dot(self, widened(a), widened(b), accumulator, precision, max_imprecise)

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, dtype)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)
