"""The fused denoising update against float64, on every backend that this machine has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend

from madformer.kernels import dispatch
from madformer.kernels.denoise_step import denoise_step, denoise_step_ref
from tests.helpers.testing import COMPILER, DEVICE, assert_within_budget, each_dtype

NAN = float("nan")
CPP, TRITON = (next(status for status in dispatch.report() if status.backend == name) for name in ("cpp", "triton"))
needs_cpp = pytest.mark.skipif(not CPP.available, reason=CPP.reason)
needs_triton = pytest.mark.skipif(not TRITON.available, reason=TRITON.reason)
# C++ is for the CPU on every machine, and where it was built with CUDA for that, too.
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda_build = pytest.mark.skipif(not dispatch.CUDA_ARCHITECTURES, reason="madformer._C was built without CUDA")
each_backend = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param("reference", DEVICE, id="reference"),
        pytest.param("cpp", CPU, marks=needs_cpp, id="cpp"),
        pytest.param("cpp", CUDA, marks=[pytest.mark.gpu, needs_cuda_build], id="cpp-cuda"),
        pytest.param("triton", DEVICE, marks=needs_triton, id="triton"),
    ],
)
each_op = pytest.mark.parametrize(
    ("op", "device"),
    [
        pytest.param("denoise_step_", CPU, id="denoise_step_"),
        pytest.param("denoise_step_", CUDA, marks=[pytest.mark.gpu, needs_cuda_build], id="denoise_step_-cuda"),
        pytest.param("denoise_step_triton_", DEVICE, marks=needs_triton, id="denoise_step_triton_"),
    ],
)


class Case(NamedTuple):
    """The tensors of one call by the names of the arguments."""

    sample: Tensor
    model_output: Tensor
    previous: Tensor
    coefficients: Tensor
    unconditional: Tensor | None = None
    guidance_scale: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        return Case(*(None if tensor is None else function(tensor) for tensor in self))

    def to(self, device: torch.device) -> Case:
        return self.map(lambda tensor: tensor.to(device))

    def run(self, clip: float | None = None, backend: str = "auto") -> None:
        denoise_step(**self._asdict(), clip=clip, backend=backend)


def make_case(
    *shape: int, dtype: torch.dtype = torch.float32, first_step_rows: tuple[int, ...] = (), guided: bool = False
) -> Case:
    """Random tensors; the rows that are at their first step have an uninitialised ``previous``."""
    generator = torch.Generator().manual_seed(0)
    sample, model_output, previous, unconditional = torch.randn(4, *shape, generator=generator)
    coefficients = torch.randn(shape[0], 6, generator=generator)
    for row in first_step_rows:
        previous[row] = NAN
        coefficients[row, 5] = 0
    if not guided:
        return Case(sample, model_output.to(dtype), previous, coefficients)
    scale = 1 + 4 * torch.rand(shape[0], generator=generator)
    return Case(sample, model_output.to(dtype), previous, coefficients, unconditional.to(dtype), scale)


def check(case: Case, clip: float | None, backend: str) -> None:
    """Runs the op on the case's own tensors, in place, and compares both results with float64."""
    oracle, eager = copy.deepcopy(case).map(Tensor.double), copy.deepcopy(case)
    denoise_step_ref(**oracle._asdict(), clip=clip)
    denoise_step_ref(**eager._asdict(), clip=clip)
    case.run(clip, backend)
    assert_within_budget(case.sample, oracle.sample, eager.sample, name="sample")
    assert_within_budget(case.previous, oracle.previous, eager.previous, name="previous")


@each_backend
@each_dtype
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3,), (3, 7), (2, 3, 15, 17), (3, 4, 15, 17)])
def test_matches_float64(
    shape: tuple[int, ...], clip: float | None, guided: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    case = make_case(*shape, dtype=dtype, guided=guided)
    check(case.to(device), clip, backend)


@needs_cpp
@pytest.mark.parametrize("guided", [False, True])
def test_threads_share_rows(guided: bool) -> None:
    check(make_case(5, 3, 101, 67, guided=guided, first_step_rows=(1, 3)), 1.0, "cpp")


@each_backend
def test_guidance_of_one_is_none(backend: str, device: torch.device) -> None:
    guided, plain = (make_case(2, 3, 8, guided=True).to(device) for _ in range(2))
    assert guided.guidance_scale is not None
    guided.guidance_scale.fill_(1)
    oracle = copy.deepcopy(plain).map(Tensor.double)
    denoise_step_ref(*oracle[:4])
    plain = plain._replace(unconditional=None, guidance_scale=None)
    guided.run(backend=backend)
    plain.run(backend=backend)
    # u + (m - u) is m but for two roundings of values of this size.
    rounding = 8 * torch.finfo(torch.float32).eps * oracle.sample.abs().max()
    assert (guided.sample - plain.sample).abs().max() <= rounding
    assert (guided.previous - plain.previous).abs().max() <= rounding


@each_backend
def test_previous_is_not_read_where_its_coefficient_is_zero(backend: str, device: torch.device) -> None:
    case = make_case(4, 3, 8, 8, first_step_rows=(0, 2))
    # Finite, and right in the other rows, which do read it.
    check(case.to(device), 1.0, backend)


@each_backend
def test_clip_bounds_the_prediction_and_lets_nan_through(backend: str, device: torch.device) -> None:
    case = make_case(2, 64).to(device)
    case.sample[1, 3] = NAN
    case.run(0.25, backend)
    assert case.previous[0].abs().max() == 0.25
    assert case.previous[1, 3].isnan()
    assert case.sample[1, 3].isnan()
    assert case.sample.isnan().sum() == 1


@each_backend
@each_dtype
def test_strided_arguments(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Chunks, channels-last and expanded coefficients, as the model and the loop pass them."""
    base = make_case(4, 6, 8, 8, dtype=dtype, guided=True).to(device)
    assert base.unconditional is not None
    table = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)).to(device)
    case = Case(
        sample=base.sample.chunk(2, dim=1)[1],
        model_output=base.model_output[:, :3].to(memory_format=torch.channels_last),
        previous=base.previous.transpose(2, 3)[:, ::2],
        coefficients=table[:, ::2].expand(4, 6),
        unconditional=base.unconditional[:1, 3:].expand(4, -1, -1, -1),
        guidance_scale=torch.tensor([[3.0, 1.0]], device=device)[:, 0].expand(4),
    )
    untouched = base.sample[:, :3].clone(), base.previous[:, 1::2].clone()
    check(case, 1.0, backend)
    assert torch.equal(base.sample[:, :3], untouched[0])
    assert torch.equal(base.previous[:, 1::2], untouched[1])


@each_backend
def test_addresses_that_vectors_cannot_be_loaded_from(backend: str, device: torch.device) -> None:
    """Contiguous rows of a multiple of four, one element off."""
    case = make_case(2, 8, dtype=torch.bfloat16, guided=True).to(device)
    check(case.map(lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)), 1.0, backend)


@each_backend
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0)])
def test_nothing_to_do(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    case = make_case(*shape, guided=True).to(device)
    case.run(1.0, backend)
    assert case.sample.shape == shape


@each_backend
def test_inference_mode(backend: str, device: torch.device) -> None:
    with torch.inference_mode():
        check(make_case(2, 3, 4, guided=True).to(device), 1.0, backend)


@each_op
@pytest.mark.parametrize("guided", [False, True])
@each_dtype
def test_opcheck(dtype: torch.dtype, guided: bool, op: str, device: torch.device) -> None:
    case = make_case(1, 3, 4, dtype=dtype, guided=guided).to(device)
    arguments = (*case[:4], 1.0 if guided else None, *case[4:])
    library.opcheck(getattr(torch.ops.madformer, op).default, arguments)


@each_backend
def test_compiles_whole_and_once(backend: str, device: torch.device) -> None:
    counter = CompileCounterWithBackend(COMPILER if device.type == "cuda" else "aot_eager")
    compiled = torch.compile(denoise_step, fullgraph=True, backend=counter)
    for seed in range(2):
        case = make_case(3, 4, 5, first_step_rows=(seed,), guided=True).to(device)
        oracle, eager = copy.deepcopy(case).map(Tensor.double), copy.deepcopy(case)
        denoise_step_ref(**oracle._asdict(), clip=1.0)
        eager.run(1.0, backend)
        compiled(**case._asdict(), clip=1.0, backend=backend)
        assert_within_budget(case.sample, oracle.sample, eager.sample, name="sample")
        assert_within_budget(case.previous, oracle.previous, eager.previous, name="previous")
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
        ({"unconditional": torch.zeros(2, 3)}, "unconditional and guidance_scale must be given together"),
        ({"guidance_scale": torch.ones(2)}, "unconditional and guidance_scale must be given together"),
        (
            {"unconditional": torch.zeros(2, 4), "guidance_scale": torch.ones(2)},
            r"unconditional must have the shape \(2, 3\), got \(2, 4\)",
        ),
        (
            {"unconditional": torch.zeros(2, 3).half(), "guidance_scale": torch.ones(2)},
            "unconditional must be torch.float32, got torch.float16",
        ),
        (
            {"unconditional": torch.zeros(2, 3), "guidance_scale": torch.ones(1)},
            r"guidance_scale must have the shape \(2,\), got \(1,\)",
        ),
        (
            {"unconditional": torch.zeros(2, 3), "guidance_scale": torch.ones(2, device="meta")},
            "guidance_scale must be on cpu",
        ),
        ({"clip": 0.0}, "clip=0.0 must be positive"),
        ({"clip": NAN}, "clip=nan must be positive"),
        ({"backend": "cuda"}, "backend='cuda' must be one of auto, triton, cpp, reference for denoise_step"),
    ],
)
def test_bad_arguments_are_named_before_any_work(change: dict[str, object], message: str) -> None:
    case = make_case(2, 3)
    before = copy.deepcopy(case)
    with pytest.raises(ValueError, match=message):
        denoise_step(**{**case._asdict(), **change})
    assert all(torch.equal(now, then) for now, then in zip(case[:4], before[:4], strict=True))


@needs_cpp
def test_compiled_op_guards_its_memory_without_the_public_function() -> None:
    sample, model_output, previous, coefficients, unconditional, scale = make_case(2, 3, guided=True)
    op = torch.ops.madformer.denoise_step_
    for bad in (
        (sample, model_output[:, :2], previous, coefficients),
        (sample, model_output, previous, coefficients[:1]),
        (sample, model_output, previous.double(), coefficients),
        (sample, model_output.long(), previous, coefficients),
        (sample, model_output, previous, coefficients, None, unconditional),
        (sample, model_output, previous, coefficients, None, None, scale),
        (sample, model_output, previous, coefficients, None, unconditional[:1], scale),
        (sample, model_output, previous, coefficients, None, unconditional.half(), scale),
        (sample, model_output, previous, coefficients, None, unconditional, scale[:1]),
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


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", pytest.param("cpp", marks=needs_cuda_build)])
def test_a_cuda_graph_follows_coefficients_on_the_device(backend: str) -> None:
    """One capture serves all steps: nothing of it depends on a value that the host knew."""
    case = make_case(2, 4, 32, 32, dtype=torch.bfloat16, guided=True).to(DEVICE)
    start, expected = copy.deepcopy(case), copy.deepcopy(case)
    case.run(1.0, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(1.0, backend)
    for tensor, first in zip(case, start, strict=True):
        tensor.copy_(first)
    for step in range(3):
        for tensors in (case, expected):
            tensors.coefficients.copy_(start.coefficients / (step + 1))
        graph.replay()
        expected.run(1.0, backend)
    assert torch.equal(case.sample, expected.sample)
    assert torch.equal(case.previous, expected.previous)
