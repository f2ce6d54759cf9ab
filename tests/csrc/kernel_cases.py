"""Cases of the kernels for CPUs with the truth about them, in a file that ``kernel_driver.cpp`` reads.

``python -m tests.csrc.kernel_cases FILE`` writes it. Results are PyTorch's in float64, gradients its autograd's. The
file is a sequence of cases: the name of a kernel, then numbers and arrays in the order in which the driver takes them.
All that counts something is an int64; an array is its dtype, its number of elements and these.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madformer.kernels.adaln import adaln_ref
from madformer.kernels.block_causal_attention import BlockLayout
from madformer.kernels.block_causal_attention.compiled import readers_of
from madformer.kernels.block_causal_attention.reference import block_causal_attention_ref
from madformer.kernels.cached_attention import cached_attention_ref
from madformer.kernels.denoise_step import denoise_step_ref
from madformer.kernels.group_norm_silu import group_norm_silu_ref
from madformer.kernels.qk_norm_rope import qk_norm_rope_ref
from madformer.kernels.rms_norm import rms_norm_ref
from madformer.kernels.swiglu import swiglu_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-5
Case = tuple[str, Sequence[int], Sequence[Tensor | None]]


def packed(text: str) -> bytes:
    return struct.pack("<q", len(text)) + text.encode()


def write(path: Path, cases: Iterator[Case]) -> int:
    count = 0
    with path.open("wb") as file:
        for name, numbers, arrays in cases:
            file.write(packed(name) + struct.pack(f"<q{len(numbers)}q", len(numbers), *numbers))
            file.write(struct.pack("<q", len(arrays)))
            for array in arrays:
                # a copy: of what has one element, any stride is contiguous
                x = torch.empty(0) if array is None else array.detach().clone(memory_format=torch.contiguous_format)
                file.write(struct.pack("<qq", DTYPES.index(x.dtype), x.numel()))
                file.write(x.view(torch.uint8).numpy().tobytes() if x.numel() else b"")
            count += 1
    return count


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def differentiated(function: Any, inputs: dict[str, Tensor | None], grads: Sequence[Tensor], **options: Any) -> Any:
    """Results in float64, and the gradient of every input, None where there is no input."""
    exact = {name: None if x is None else x.double().requires_grad_() for name, x in inputs.items()}
    results = function(**exact, **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [g.double() for g in grads])
    return [x.detach() for x in results], [None if x is None else x.grad for x in exact.values()]


def swiglu_cases() -> Iterator[Case]:
    for dtype, (rows, columns) in itertools.product(DTYPES[:3], ((1, 1), (3, 7), (2, 67), (0, 4))):
        both, grad = 3 * draw(rows, 2 * columns, dtype=dtype), draw(rows, columns, dtype=dtype)
        gate, up = both.chunk(2, dim=1)
        (out,), grads = differentiated(swiglu_ref, {"gate": gate, "up": up}, [grad])
        yield "swiglu", (rows, columns), (both, grad, out, *grads)


def norm_cases() -> Iterator[Case]:
    shapes = ((1, 1, 3, 3), (2, 2, 3, 19), (1, 1, 5, 200), (2, 1, 0, 8))
    for (x_dtype, stream_dtype), (samples, blocks, tokens, columns) in itertools.product(
        itertools.product(DTYPES[:3], repeat=2), shapes
    ):
        shape = samples, blocks * tokens, columns
        x, residual = 1 + draw(*shape, dtype=x_dtype), draw(*shape, dtype=stream_dtype)
        shift, scale, gate = draw(samples, blocks, 3 * columns, dtype=x_dtype).chunk(3, dim=-1)
        grads = draw(*shape, dtype=x_dtype), draw(*shape, dtype=stream_dtype)
        sizes = samples, blocks, tokens, columns
        weight, bias = draw(columns), draw(columns)
        modulation = torch.cat((shift, scale, gate), -1)
        given = {"x": x, "shift": shift, "scale": scale, "weight": weight, "bias": bias} | {
            "residual": residual, "gate": gate,
        }  # fmt: skip
        results, gradients = differentiated(adaln_ref, given, grads, norm="layer", eps=EPS)
        arrays = x, modulation, weight, bias, residual, *grads
        yield "residual_norm", (*sizes, 1), (*arrays, *results, *gradients)
        plain: dict[str, Tensor | None] = {"x": x, "weight": weight}
        results, (dx, dweight) = differentiated(rms_norm_ref, plain, grads[:1], eps=EPS)
        arrays = x, None, weight, None, None, grads[0], None
        yield "residual_norm", (*sizes, 0), (*arrays, *results, None, dx, None, None, dweight, None, None, None)


def group_norm_cases() -> Iterator[Case]:
    # One pixel; narrow groups; more than a piece; more than one thread's share.
    shapes = ((2, 6, 1, 1, 2), (2, 6, 3, 5, 3), (1, 19, 16, 17, 1), (1, 40, 61, 109, 8), (0, 4, 2, 2, 2))
    for dtype, (maps, channels, height, width, groups), planes in itertools.product(DTYPES[:3], shapes, (0, 1)):
        if dtype != torch.float32 and height > 32:
            continue
        shape = maps, channels, height, width
        x, grad = 1 + draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
        parameters = draw(channels), draw(channels), draw(maps, channels)
        given = dict(zip(("x_NCHW", "weight", "bias", "temb_NC"), (x, *parameters), strict=True))
        results, gradients = differentiated(group_norm_silu_ref, given, [grad], num_groups=groups, eps=EPS)

        def laid_out(x: Tensor, planes: int = planes) -> Tensor:
            return x if planes else x.permute(0, 2, 3, 1)

        maps_of = laid_out(x), laid_out(grad), laid_out(results[0]), laid_out(gradients[0])
        yield "group_norm_silu", (*shape, groups, planes), (*maps_of, *parameters, *gradients[1:])


def rope_cases() -> Iterator[Case]:
    batch, tokens, heads = 2, 5, 3
    for dtype, (size, axes) in itertools.product(DTYPES[:3], ((64, 1), (64, 2), (12, 3))):
        qkv, weights = draw(batch, tokens, 3 * heads * size, dtype=dtype), (1 + draw(2, size) / 4)
        angles = draw(tokens, size // 2).repeat_interleave(2, dim=1)
        angles = angles.unflatten(1, (axes, -1))[..., ::2].repeat(1, 1, 2).flatten(1)
        tables = angles.cos(), angles.sin()
        exact, exact_weights = qkv.double().requires_grad_(), weights.double().requires_grad_()
        lists = [exact], [exact_weights[0]], [exact_weights[1]], *([table.double()] for table in tables)
        results = qk_norm_rope_ref(*lists, num_heads=heads, axes=axes, eps=EPS)
        grads = [draw(batch, tokens, heads, size, dtype=dtype) for _ in range(3)]
        torch.autograd.backward(results, [g.transpose(1, 2).double() for g in grads])
        outputs = [x.transpose(1, 2) for x in results]
        numbers = batch, tokens, heads, size, axes
        yield "qk_norm_rope", numbers, (qkv, weights, *tables, *grads, *outputs, exact.grad, exact_weights.grad)


def attention_cases() -> Iterator[Case]:
    # One key; a part of a vector of queries, all of one, and two tiles; keys of two places, and beyond a tile.
    shapes = ((1, 3, 0, 1, (0, 0)), (3, 12, 5, 0, (2, 5)), (16, 64, 300, 0, (0, 300)), (37, 7, 150, 9, (140, 1)))
    for dtype, (queries, size, capacity, own, lengths) in itertools.product(DTYPES[:3], shapes):
        q, *cache = draw(2, 2, queries, size, dtype=dtype), *draw(2, 2, 2, capacity, size, dtype=dtype)
        k, v = draw(2, 2, 2, own, size, dtype=dtype)
        exact = [x.double() for x in (q, *cache)]
        attended = cached_attention_ref(
            *exact, torch.tensor(lengths), *([k.double(), v.double()] if own else []), scale=size**-0.5
        )
        for row, length in zip(range(2), lengths, strict=True):
            for x in cache:
                x[row, :, length:] = torch.nan
        numbers = 2, 2, queries, size, capacity, own, *lengths
        yield "attention", numbers, (q, *cache, k, v, attended.transpose(1, 2))


def block_attention_cases() -> Iterator[Case]:
    # One token and channel; parts of a panel; a text, whole panels and more; two tiles of queries.
    layouts = (
        (BlockLayout(1, 1), 1), (BlockLayout(3, 3, 2, text_length=5), 12),
        (BlockLayout(32, 2, 2, text_length=33, text_queries=False), 32), (BlockLayout(67, 1, 1), 40),
        (BlockLayout(4, 2, 3, cross_block=False, text_length=9, clean_queries=False), 7),
    )  # fmt: skip
    for dtype, (layout, size) in itertools.product(DTYPES[:3], layouts):
        lengths = layout.query_length, layout.key_length, layout.key_length, layout.query_length
        q, k, v, grad = (draw(2, 2, length, size, dtype=dtype) for length in lengths)
        inputs = {"q_BHLD": q, "k_BHLD": k, "v_BHLD": v}
        exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
        out, lse = block_causal_attention_ref(**exact, layout=layout)
        out.backward(grad.double())
        truth = (x.transpose(1, 2) for x in (out, *(x.grad for x in exact.values() if x.grad is not None)))
        attended, *grads = truth
        numbers = 2, 2, *lengths[:2], size, *readers_of(layout)
        yield "block_causal_attention", numbers, (q, k, v, grad, attended, lse, *grads)


def winograd_cases() -> Iterator[Case]:
    # arXiv:1509.09308, section 4.1
    spread = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).double()
    gather = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]]).double()
    shapes = ((1, 1, 1, 1), (2, 3, 5, 19), (3, 4, 2, 8), (0, 2, 2, 4))
    for (maps, height, width, channels), doubled in itertools.product(shapes, (0, 1)):
        x, bias = draw(maps, height, width, channels), draw(channels)
        exact = x.double().requires_grad_()
        whole = exact.repeat_interleave(1 + doubled, 1).repeat_interleave(1 + doubled, 2)
        rows, columns = whole.shape[1:3]
        padded = torch.nn.functional.pad(whole, (0, 0, 1, 1 + columns % 2, 1, 1 + rows % 2))
        windows = padded.unfold(1, 4, 2).unfold(2, 4, 2)
        kept = spread[[0, 1, 3]] if doubled else spread
        tiles = torch.einsum("ai,nyxcij,bj->nyxabc", kept, windows, kept)
        products, grad_tiles = draw(*tiles.shape), draw(*tiles.shape)
        tiles.backward(grad_tiles.double())
        exact_products = products.double().requires_grad_()
        kept = gather[:, [0, 1, 3]] if doubled else gather
        results = torch.einsum("pa,nyxabc,qb->nypxqc", kept, exact_products, kept) + bias.double()
        result = results.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
        grad = draw(*result.shape)
        result.backward(grad.double())
        arrays = x, bias, grad_tiles, products, grad, tiles, exact.grad, result, exact_products.grad
        yield "winograd", (maps, rows, columns, channels, doubled), arrays


def denoise_cases() -> Iterator[Case]:
    for dtype, size in itertools.product(DTYPES[:3], (1, 37)):
        sample, previous = draw(3, size), draw(3, size)
        output, unconditional = draw(2, 3, size, dtype=dtype)
        coefficients, guidance = draw(3, 6), 1 + draw(3).abs()
        after = sample.double(), previous.double()
        denoise_step_ref(
            after[0], output.double(), after[1], coefficients.double(), clip=1.0,
            unconditional=unconditional.double(), guidance_scale=guidance.double(),
        )  # fmt: skip
        yield "denoise_step", (3, size), (sample, output, unconditional, previous, coefficients, guidance, *after)


def every_case() -> Iterator[Case]:
    torch.manual_seed(0)
    for cases in (
        swiglu_cases, norm_cases, group_norm_cases, rope_cases, attention_cases, block_attention_cases,
        winograd_cases, denoise_cases,
    ):  # fmt: skip
        yield from cases()


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    print(f"{write(Path(sys.argv[1]), every_case())} cases in {sys.argv[1]}")
