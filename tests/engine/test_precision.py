"""Precision modes: FP8 against arithmetic written out in float64, and what each mode leaves as it was.

Bounds are those of e4m3: 3 bits of mantissa round a value by at most ``U = 2^-4`` of itself, and below 2^-6 by 2^-10.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from madformer.config import tiny
from madformer.engine import precision
from madformer.engine.packing import PackedLinear, can_pack, packed
from madformer.engine.precision import FP8_MAX, PRECISIONS, FP8Linear, FP8SwiGLU, apply, quantize_rows, unquantized
from madformer.kernels import swiglu
from madformer.kernels.dispatch import BackendUnavailableError
from madformer.model import MADFormer
from madformer.model.layer import SwiGLU, Tower
from madformer.pipeline import MADFormerPipeline
from tests.helpers.testing import DEVICE, perturb, relative_error

U = 2.0**-4
BF16 = torch.finfo(torch.bfloat16).eps / 2
# Sums in fp32 on a CPU; in the 22 bits of the matrix units, 32 products at a time, on a GPU.
SUM = 2.0**-23 if DEVICE.type == "cpu" else 2.0**-13
# Errors of rounding are even within U at worst, so of root mean square U / sqrt(3); a product has two of them.
LAYER_ERROR = U * (2 / 3) ** 0.5


@pytest.fixture(autouse=True)
def same_process_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def make_model(dtype: torch.dtype = torch.float32) -> MADFormer:
    torch.manual_seed(0)
    model = perturb(MADFormer(tiny())).to(DEVICE, dtype)
    assert isinstance(model, MADFormer)
    return model


def make_linear(inputs: int = 64, outputs: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(DEVICE)


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to the nearest number of e4m3, ties to even, in float64."""
    exponent = torch.where(x == 0, 0, x.abs().log2().floor()).clamp_min(-6)
    step = 2.0 ** (exponent - 3)
    return (x / step).round() * step


def written_out(x: Tensor) -> Tensor:
    """What ``quantize_rows`` stands for, in float64: the scale and the quotient are those of fp32."""
    scale = (x.abs().amax(-1, keepdim=True).float() / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return to_e4m3((x.float() / scale).double()) * scale.double()


def rounding(x: Tensor) -> Tensor:
    """The most that quantising moves every value."""
    scale = x.double().abs().amax(-1, keepdim=True) / FP8_MAX
    return torch.maximum(U * x.double().abs(), 2.0**-10 * scale) * (1 + 1e-6)


def dequantized(x: Tensor) -> Tensor:
    values, scale = quantize_rows(x)
    return values.double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_rounded_to_e4m3(dtype: torch.dtype) -> None:
    """Over nine decades, so that every exponent of e4m3 occurs, and what is below its smallest number."""
    torch.manual_seed(0)
    x = (torch.randn(64, 512) * 10 ** torch.linspace(-4, 5, 512)[torch.randperm(512)]).to(DEVICE, dtype)
    assert torch.equal(dequantized(x), written_out(x))
    error = (dequantized(x) - x.double()).abs()
    assert (error <= rounding(x)).all()
    assert (error > 0.9 * rounding(x)).any()
    peaks, (values, _) = x.abs().amax(-1), quantize_rows(x)
    assert (values.float().abs().amax(-1) == FP8_MAX).all()
    torch.testing.assert_close(dequantized(x).abs().amax(-1), peaks.double(), rtol=1e-6, atol=0)


def test_rows_of_zero_and_of_no_number() -> None:
    x = torch.full((6, 16), 7.0, device=DEVICE)  # FP8_MAX / 64: a scale without rounding
    x[0], x[1], x[2, 3], x[3, 3], x[4, 3] = 0, 1e-42, float("nan"), float("inf"), -float("inf")
    back = dequantized(x)
    assert (back[0] == 0).all()
    assert back[1].abs().max() <= 2e-42
    assert back[2:5].isnan().any(-1).all()
    assert torch.equal(back[5], x[5].double())


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_linear_is_the_product_of_what_is_quantised(bias: bool) -> None:
    linear = make_linear(bias=bias)
    x = torch.randn(2, 37, 64).to(DEVICE, torch.bfloat16)
    out = FP8Linear(linear)(x)
    assert (out.shape, out.dtype) == ((2, 37, 48), torch.bfloat16)
    x_q, w_q = written_out(x), written_out(linear.weight)
    expected, terms = F.linear(x_q, w_q), F.linear(x_q.abs(), w_q.abs())
    if bias:
        expected, terms = expected + linear.bias.bfloat16().double(), terms + linear.bias.double().abs()
    assert ((out.double() - expected).abs() <= BF16 * expected.abs() + 64 * SUM * terms).all()


@torch.inference_mode()
def test_error_of_a_linear_layer() -> None:
    """Every element within what the rounding of its factors can do, and all together within what it does."""
    linear = make_linear(256, 128, bias=False)
    x = torch.randn(100, 256).to(DEVICE, torch.bfloat16)
    out, exact = FP8Linear(linear)(x), F.linear(x.double(), linear.weight.double())
    x_abs, w_abs = x.double().abs(), linear.weight.double().abs()
    most = F.linear(x_abs + rounding(x), w_abs + rounding(linear.weight)) - F.linear(x_abs, w_abs)
    assert ((out.double() - exact).abs() <= (1 + BF16) * most + BF16 * exact.abs()).all()
    assert LAYER_ERROR / 4 < relative_error(out, exact) < LAYER_ERROR


@torch.inference_mode()
def test_numbers_that_are_none_stay_in_their_row() -> None:
    layer, x = FP8Linear(make_linear(bias=False)), torch.randn(4, 64).to(DEVICE, torch.bfloat16)
    clean = layer(x)
    x[1, 5], x[2] = float("nan"), 0
    out = layer(x)
    assert out[1].isnan().all()
    assert (out[2] == 0).all()
    assert torch.equal(out[[0, 3]], clean[[0, 3]])


@torch.inference_mode()
def test_swiglu_quantises_gate_and_up_at_once() -> None:
    """Per output channel nothing changes by putting them together."""
    mlp = SwiGLU(tiny()).to(DEVICE)
    x = torch.randn(2, 9, tiny().hidden_size).to(DEVICE, torch.bfloat16)
    gate, up, down = (FP8Linear(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    joined = FP8SwiGLU(mlp)
    torch.testing.assert_close(joined.gate_up_proj(x), torch.cat((gate(x), up(x)), dim=-1), rtol=2 * BF16, atol=0)
    if DEVICE.type == "cpu":
        assert torch.equal(joined(x), down(swiglu(gate(x), up(x))))
    double, mlp = joined(x).double(), mlp.double()
    # The product of two has the errors of both, and the last layer adds its own.
    assert relative_error(double, mlp(x.double())) < LAYER_ERROR * 3**0.5


@torch.inference_mode()
def test_keys_and_values_alone_are_rows_of_the_projection() -> None:
    config, model = tiny(), make_model()
    x = torch.randn(2, 5, config.hidden_size).to(DEVICE, torch.bfloat16)
    for name, tower in apply(model, "fp8").named_modules():
        if isinstance(tower, Tower):
            whole, part = tower.query_key_value(x)[..., config.hidden_size :], tower.key_value(x)
            source = model.get_submodule(name)
            exact = source.key_value(x.float())
            assert relative_error(part, exact) < LAYER_ERROR, name
            if DEVICE.type == "cpu":
                assert torch.equal(part, whole), name
            else:  # Which sums are taken in which order depends on the number of outputs there.
                torch.testing.assert_close(part, whole, rtol=2 * BF16, atol=BF16)


def predict(model: MADFormer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    clean, noisy = (torch.randn(3, 4, 16, 4, generator=generator).to(model.device, model.dtype) for _ in range(2))
    timestep = torch.tensor([[998, 700, 300, 1]] * 3, device=model.device)
    with torch.inference_mode():
        return model(clean, noisy, timestep).prediction.float()


def test_error_of_the_whole_model() -> None:
    """Twice that of bf16 and of e4m3, each measured by itself: e4m3 in fp32, by rounding weights and inputs of layers.

    And less than that of its products, were they in sequence and independent: four in a layer.
    """
    model = make_model().requires_grad_(False)
    exact, default, fp8 = (predict(apply(model, name)) for name in ("exact", "default", "fp8"))
    assert torch.equal(exact, predict(model))
    for tower in (module for module in model.modules() if isinstance(module, Tower)):
        for layer in (module for module in tower.modules() if isinstance(module, nn.Linear)):
            layer.weight.copy_(written_out(layer.weight))
            layer.register_forward_pre_hook(lambda _, inputs: tuple(written_out(x).float() for x in inputs))
    error, of_bf16, of_e4m3 = (relative_error(x, exact) for x in (fp8, default, predict(model)))
    assert error > max(of_bf16, of_e4m3)
    assert error < 2 * (of_bf16**2 + of_e4m3**2) ** 0.5
    assert error < LAYER_ERROR * (4 * tiny().num_layers) ** 0.5


def test_default_rounds_norms_once_and_keeps_the_rest_in_fp32() -> None:
    """In bf16 inside, a norm would be off by several roundings; latents and the timestep MLP are not bf16 at all."""
    source = make_model()
    model = apply(source, "default")
    tower = next(module for module in model.modules() if isinstance(module, Tower))
    torch.manual_seed(0)
    x = torch.randn(50, tiny().hidden_size).to(DEVICE, torch.bfloat16)
    norm, weight = tower.input_norm, tower.input_norm.weight.double()
    expected = F.rms_norm(x.double(), (x.shape[-1],), weight, norm.eps)
    assert ((norm(x).double() - expected).abs() <= BF16 * (1 + 1e-4) * expected.abs()).all()

    timesteps = torch.tensor([998, 999], device=DEVICE)
    embedded = model.downsampler.time_embedding(timesteps)
    assert embedded.dtype == torch.float32
    assert not torch.equal(embedded[0].bfloat16().float(), embedded[0])
    assert all(model.rope.get_buffer(name).dtype == torch.float32 for name in ("cos", "sin"))

    pipeline = MADFormerPipeline(model, None, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(num_inference_steps=2, seed=0, output_type="latent").images
    assert latents.dtype == torch.float32
    assert not torch.equal(latents.bfloat16().float(), latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_source_is_left_as_it_is(name: str, dtype: torch.dtype) -> None:
    source = make_model(dtype).train()
    before = {key: value.clone() for key, value in source.state_dict().items()}
    kinds = {key: type(module) for key, module in source.named_modules()}
    result = apply(source, name)
    result.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not result.training
    assert source.training
    assert all(p.requires_grad for p in source.parameters())
    assert kinds == {key: type(module) for key, module in source.named_modules()}
    assert before.keys() == source.state_dict().keys()
    assert all(torch.equal(value, before[key]) and value.dtype == dtype for key, value in source.state_dict().items())
    assert {p.dtype for p in result.parameters()} == {PRECISIONS[name].dtype}
    shared = {p.data_ptr() for p in source.parameters()} & {p.data_ptr() for p in result.parameters()}
    assert bool(shared) == (dtype == PRECISIONS[name].dtype)


def test_fp8_takes_the_weights_before_they_are_rounded_to_bf16() -> None:
    source = make_model()
    result = apply(source, "fp8")
    layer = result.get_submodule("layers.0.towers.clean.proj")
    assert isinstance(layer, FP8Linear)
    expected = written_out(source.get_parameter("layers.0.towers.clean.proj.weight"))
    assert torch.equal(layer.weight_NK.double() * layer.scale_N1.double(), expected)


def test_which_layers_are_fp8() -> None:
    """All of the towers, none of the U-Net."""
    config, result = tiny(), apply(make_model(), "fp8")
    towers = sum(isinstance(module, Tower) for module in result.modules())
    assert sum(isinstance(module, FP8Linear) for module in result.layers.modules()) == 4 * towers
    assert unquantized(result) == []
    assert len(unquantized(make_model())) == 5 * towers
    for unet in (result.downsampler, result.upsampler):
        assert not any(isinstance(module, FP8Linear) for module in unet.modules())
    assert towers == 2 * config.num_layers


@pytest.mark.parametrize(
    ("changes", "kept"), [({"intermediate_size": 72}, 3), ({"hidden_size": 72, "num_heads": 2}, 5)], ids=["mlp", "all"]
)
def test_sizes_that_do_not_fit_stay_bf16(changes: dict[str, int], kept: int) -> None:
    torch.manual_seed(0)
    source = perturb(MADFormer(tiny().replace(**changes))).to(DEVICE)
    assert isinstance(source, MADFormer)
    towers = 2 * source.config.num_layers
    with pytest.warns(UserWarning, match=rf"{kept * towers} linear layers stay bf16.*: layers\.0\.towers\.clean"):
        result = apply(source, "fp8")
    assert len(unquantized(result)) == kept * towers
    default = apply(source, "default")
    error = relative_error(predict(result), predict(default))
    assert (error == 0) == (kept == 5)
    assert error < LAYER_ERROR * (4 * source.config.num_layers) ** 0.5


def test_layers_that_are_more_than_their_weights_stay_bf16() -> None:
    """An adapter, a hook or a forward of its own is not lost behind FP8 copies of the weights."""
    model = make_model()
    tower = model.layers[-1].towers["noise"]
    assert isinstance(tower, Tower)
    plain = apply(model, "fp8")
    tower.proj.register_forward_hook(lambda module, args, output: 0 * output)
    tower.mlp.register_forward_hook(lambda module, args, output: 0 * output)
    tower.qkv.__class__ = type("Adapted", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    with pytest.warns(UserWarning, match="5 linear layers stay bf16, .* hooks or adapters"):
        quantized = apply(model, "fp8").layers[-1].towers["noise"]
    x = torch.randn(2, 3, model.config.hidden_size, dtype=torch.bfloat16)
    before = plain.layers[-1].towers["noise"]
    assert isinstance(before, Tower)
    assert isinstance(quantized, Tower)
    assert not quantized.proj(x).any()
    assert not quantized.mlp(x).any()
    assert relative_error(quantized.qkv(x), 2 * before.qkv(x)) < 0.1
    assert relative_error(quantized.key_value(x), 2 * before.key_value(x)) < 0.1


def test_a_cast_or_a_move_of_the_model_keeps_fp8() -> None:
    result = apply(make_model(), "fp8")
    expected = predict(result)
    result.to(torch.float32).to(torch.bfloat16).to("cpu").to(DEVICE)
    assert torch.equal(predict(result), expected)


def test_packing_leaves_fp8_alone() -> None:
    result = apply(make_model(), "fp8")
    if not can_pack(result):
        pytest.skip("oneDNN does not run packed bf16 weights on this processor")
    duplicate = packed(result)
    theirs, ours = ({type(m) for m in model.layers.modules()} for model in (duplicate, result))
    assert theirs == ours
    assert PackedLinear in {type(m) for m in duplicate.modules()}
    own = {buffer.data_ptr() for buffer in result.buffers()}
    assert all(buffer.data_ptr() in own for buffer in duplicate.buffers())


def test_quantised_layers_trace_whole() -> None:
    """Nothing in them waits for a value: neither ``.item()`` nor a branch on a tensor."""
    layer, counter = FP8Linear(make_linear()), CompileCounterWithBackend("aot_eager")
    traced = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.inference_mode():
        for rows in (6, 7, 8):
            x = torch.randn(rows, 64).to(DEVICE, torch.bfloat16)
            torch.testing.assert_close(traced(x), layer(x), rtol=2 * BF16, atol=0)
    assert counter.frame_count <= 2  # the second for any number of rows


def test_exact_turns_tf32_off() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    model = make_model()
    apply(model, "default")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    apply(model, "exact")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    for call in (lambda: apply(model, "fp16"), lambda: precision.refusal("fp16", "cpu")):
        with pytest.raises(ValueError, match=r"^precision='fp16' must be one of exact, default, fp8$"):
            call()
    with pytest.raises(ValueError, match="the model is in fp8 already"):
        apply(apply(model, "fp8"), "default")
    assert all(precision.refusal(name, "cpu") is None for name in PRECISIONS)
    assert precision.refusal("fp8", "meta") == "it is for CUDA devices, and for CPUs to test it"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.refusal("fp8", "cuda") == "PyTorch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (
        ((8, 0), "compute capability 8.0 is below 9.0"),
        ((8, 9), "compute capability 8.9 is below 9.0"),
        ((9, 0), None),
        ((10, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert precision.refusal("fp8", "cuda:1") == expected
        assert precision.refusal("default", "cuda:1") is None


def test_refused_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "refusal", lambda *_: "compute capability 8.0 is below 9.0")
    line = rf"^precision='fp8' cannot run on {DEVICE.type}.*: compute capability 8.0 is below 9.0$"
    with pytest.raises(BackendUnavailableError, match=line):
        apply(make_model(), "fp8")


@pytest.mark.gpu
def test_a_captured_graph_quantises_anew() -> None:
    """No host synchronisation, and other activations in the same memory give what an eager call gives."""
    if (why := precision.refusal("fp8", DEVICE)) is not None:
        pytest.skip(why)
    mlp = FP8SwiGLU(SwiGLU(tiny()).to(DEVICE))
    x = torch.randn(2, 256, tiny().hidden_size, device=DEVICE, dtype=torch.bfloat16)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.stream(stream):
            mlp(x)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            out = mlp(x)
        for factor in (1.0, 100.0, 1e-3):
            x.normal_().mul_(factor)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                graph.replay()
                expected = mlp(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(out, expected)


@pytest.mark.gpu
def test_fused_quantisation_is_the_eager_one() -> None:
    """One of a thousand values may round the other way: compiled code divides by a reciprocal."""
    if (why := precision.refusal("fp8", DEVICE)) is not None:
        pytest.skip(why)
    for rows, columns in ((256, 1152), (4096, 4096), (3, 64)):
        x = torch.randn(rows, columns, device=DEVICE, dtype=torch.bfloat16)
        (fused, fused_scale), (eager, scale) = precision._quantize_rows_fused()(x), quantize_rows(x)
        torch.testing.assert_close(fused_scale, scale, rtol=1e-6, atol=0)
        assert (fused.view(torch.uint8) != eager.view(torch.uint8)).double().mean() < 1e-3
        assert ((fused.double() * fused_scale.double() - x.double()).abs() <= rounding(x) * (1 + 1e-5)).all()


def test_rows_are_traced_once() -> None:
    """The rows' quantisation as Dynamo traces it, for any number of rows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = torch.compile(quantize_rows, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (32, 48, 2, 64):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        torch.testing.assert_close(traced(x), quantize_rows(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
