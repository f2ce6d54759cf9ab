"""The fused denoising update against float64, on every backend that this machine has."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from madformer.kernels import dispatch
from madformer.kernels.denoise_step import denoise_step, denoise_step_ref
from testing import assert_within_budget

NAN = float("nan")
CPP = next(status for status in dispatch.report() if status.backend == "cpp")
needs_cpp = pytest.mark.skipif(not CPP.available, reason=CPP.reason)
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


class Case(NamedTuple):
    """The tensors of one call, in the order of the arguments."""

    sample: Tensor
    model_output: Tensor
    previous: Tensor
    coefficients: Tensor

    def double(self) -> Case:
        return Case(*(tensor.double() for tensor in self))


def make_case(*shape: int, dtype: torch.dtype = torch.float32, first_step_rows: tuple[int, ...] = ()) -> Case:
    """Random tensors; the rows that are at their first step have an uninitialised ``previous``."""
    generator = torch.Generator().manual_seed(0)
    sample, model_output, previous = torch.randn(3, *shape, generator=generator)
    coefficients = torch.randn(shape[0], 6, generator=generator)
    for row in first_step_rows:
        previous[row] = NAN
        coefficients[row, 5] = 0
    return Case(sample, model_output.to(dtype), previous, coefficients)


def check(case: Case, clip: float | None, backend: str) -> None:
    """Runs the op on the case's own tensors, in place, and compares both results with float64."""
    oracle, eager = copy.deepcopy(case).double(), copy.deepcopy(case)
    denoise_step_ref(*oracle, clip)
    denoise_step_ref(*eager, clip)
    denoise_step(*case, clip=clip, backend=backend)
    assert_within_budget(case.sample, oracle.sample, eager.sample, name="sample")
    assert_within_budget(case.previous, oracle.previous, eager.previous, name="previous")


@each_backend
@each_dtype
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3,), (3, 7), (4, 3, 5, 7), pytest.param((5, 3, 101, 67), id="threads share rows")],
)
def test_matches_float64(shape: tuple[int, ...], clip: float | None, dtype: torch.dtype, backend: str) -> None:
    check(make_case(*shape, dtype=dtype), clip, backend)


@each_backend
def test_previous_is_not_read_where_its_coefficient_is_zero(backend: str) -> None:
    case = make_case(4, 3, 8, 8, first_step_rows=(0, 2))
    check(case, 1.0, backend)  # Finite, and right in the other rows, which do read it.


@each_backend
def test_clip_bounds_the_prediction_and_lets_nan_through(backend: str) -> None:
    case = make_case(2, 64)
    case.sample[1, 3] = NAN
    denoise_step(*case, clip=0.25, backend=backend)
    assert case.previous[0].abs().max() == 0.25
    assert case.previous[1, 3].isnan()
    assert case.sample[1, 3].isnan()
    assert case.sample.isnan().sum() == 1


@each_backend
@each_dtype
def test_strided_arguments(dtype: torch.dtype, backend: str) -> None:
    """Chunks, channels-last and expanded coefficients, as the model and the loop pass them."""
    base = make_case(4, 6, 8, 8, dtype=dtype)
    table = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    case = Case(
        sample=base.sample.chunk(2, dim=1)[1],
        model_output=base.model_output[:, :3].to(memory_format=torch.channels_last),
        previous=base.previous.transpose(2, 3)[:, ::2],
        coefficients=table[:, ::2].expand(4, 6),
    )
    untouched = base.sample[:, :3].clone(), base.previous[:, 1::2].clone()
    check(case, 1.0, backend)
    assert torch.equal(base.sample[:, :3], untouched[0])
    assert torch.equal(base.previous[:, 1::2], untouched[1])


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0)])
def test_nothing_to_do(shape: tuple[int, ...], backend: str) -> None:
    case = make_case(*shape)
    denoise_step(*case, clip=1.0, backend=backend)
    assert case.sample.shape == shape


@each_backend
def test_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        check(make_case(2, 3, 4), 1.0, backend)


@pytest.mark.parametrize("clip", [None, 1.0])
@each_dtype
def test_opcheck(dtype: torch.dtype, clip: float | None) -> None:
    library.opcheck(torch.ops.madformer.denoise_step_.default, (*make_case(2, 3, 4, dtype=dtype), clip))


@each_backend
def test_compiles_whole_and_once(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(denoise_step, fullgraph=True, backend=counter)
    for seed in range(2):
        case = make_case(3, 4, 5, first_step_rows=(seed,))
        expected = copy.deepcopy(case)
        denoise_step(*expected, clip=1.0, backend=backend)
        compiled(*case, clip=1.0, backend=backend)
        assert torch.equal(case.sample, expected.sample)
        assert torch.equal(case.previous, expected.previous)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(())}, "sample must have a batch dimension"),
        ({"sample": torch.zeros(2, 3).half()}, "sample must be torch.float32, got torch.float16"),
        ({"model_output": torch.zeros(2, 4)}, r"model_output must have the shape \(2, 3\), got \(2, 4\)"),
        ({"model_output": torch.zeros(2, 3, dtype=torch.int64)}, "model_output must be torch.float32 or "),
        ({"model_output": torch.zeros(2, 3, device="meta")}, "model_output must be on cpu"),
        ({"previous": torch.zeros(3)}, r"previous must have the shape \(2, 3\)"),
        ({"previous": torch.zeros(2, 1).expand(2, 3)}, "previous is written in place"),
        ({"coefficients": torch.zeros(2, 5)}, r"coefficients must have the shape \(2, 6\), got \(2, 5\)"),
        ({"coefficients": torch.zeros(2, 6, dtype=torch.float64)}, "coefficients must be torch.float32"),
        ({"model_output": torch.zeros(2, 3, requires_grad=True)}, "model_output must not require a gradient"),
        ({"clip": 0.0}, "clip=0.0 must be positive"),
        ({"clip": NAN}, "clip=nan must be positive"),
        ({"backend": "cuda"}, "backend='cuda' must be one of auto, cpp, reference for denoise_step"),
    ],
)
def test_bad_arguments_are_named_before_any_work(change: dict[str, object], message: str) -> None:
    case = make_case(2, 3)
    before = copy.deepcopy(case)
    with pytest.raises(ValueError, match=message):
        denoise_step(**{**case._asdict(), **change})
    assert all(torch.equal(now, then) for now, then in zip(case, before, strict=True))


@needs_cpp
def test_compiled_op_guards_its_memory_without_the_public_function() -> None:
    sample, model_output, previous, coefficients = make_case(2, 3)
    op = torch.ops.madformer.denoise_step_
    for bad in (
        (sample, model_output[:, :2], previous, coefficients),
        (sample, model_output, previous, coefficients[:1]),
        (sample, model_output, previous.double(), coefficients),
        (sample, model_output.long(), previous, coefficients),
    ):
        with pytest.raises(RuntimeError, match="must"):
            op(*bad)


def test_auto_prefers_compiled_code_and_a_named_backend_is_never_replaced() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert dispatch.resolve("denoise_step", "auto", cpu) == ("cpp" if CPP.available else "reference")
    assert dispatch.resolve("denoise_step", "auto", meta) == "reference"
    assert dispatch.resolve("denoise_step", "reference", cpu) == "reference"
    with pytest.raises(RuntimeError, match="backend='cpp' cannot run denoise_step on meta: ") as caught:
        dispatch.resolve("denoise_step", "cpp", meta)
    assert "\n" not in str(caught.value)
