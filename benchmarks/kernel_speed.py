"""How right and how fast every kernel is on a GPU, row by row: what the stages of ``gpu_check.py`` measure.

Every case of ``benchmarks/ops`` is compared with its reference at the real shape, and timed against its peers:
interleaved replays of captured calls, each on inputs that are no longer in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_record import source_of
from benchmarks.ops.case import Case, leaves_of, tensors_of
from benchmarks.timing import Captured, calls_for, capture, rounds

OURS = "triton"
SECONDS_A_ROW = 0.4


def prepare_process() -> None:
    """Settings of ``torch.compile`` for measuring, to be made before anything is compiled."""
    # Shapes change from case to case: a peer compiled for any shape would be a slower peer.
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    # A backward pass is run again and again on one forward's tensors, which it may then not take as its own memory.
    torch._functorch.config.donated_buffer = False


def directions(case: Case) -> Iterator[str]:
    for direction in ("forward", "backward"):
        if getattr(case, f"{direction}_bytes") or getattr(case, f"{direction}_flops"):
            yield direction


def roofs(device: torch.device) -> dict[str, float]:
    """The rates that everything is held against, measured here: a copy counts bytes read and written."""
    source, target = (torch.randn(1 << 30, device=device).to(torch.bfloat16) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    captured = {
        "copy": capture(lambda: lambda: target.copy_(source), 4),
        "matmul": capture(lambda: lambda: a @ b, 4),
    }
    spreads = rounds(captured, 1.0)
    return {
        "copy_tb_per_s": 2 * source.nbytes / spreads["copy"].median / 1e12,
        "matmul_tflops": 2 * 8192**3 / spreads["matmul"].median / 1e12,
    }


def variants(case: Case) -> dict[str, Callable[..., Any]]:
    """Ours and its peers, as they are called on the inputs."""

    def ours(*inputs: Any) -> Any:
        return case.run(*inputs, backend=OURS)

    return {"ours": ours, **case.peers}


def forward(run: Callable[..., Any], case: Case, device: torch.device) -> Callable[[], Any]:
    inputs = case.inputs(device)

    def call() -> Any:
        with torch.no_grad():
            return run(*inputs)

    return call


def backward(run: Callable[..., Any], case: Case, device: torch.device) -> Callable[[], Any]:
    inputs = case.inputs(device)
    outputs, leaves = tensors_of(run(*inputs)), leaves_of(inputs)
    grads = [torch.randn_like(x) for x in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)


def touched_bytes(case: Case, direction: str, device: torch.device) -> int:
    """What a call reads and writes at least: of a cache that it is given, no more than the part that is filled."""
    if least := getattr(case, f"{direction}_bytes"):
        return least
    flat = [x for entry in case.inputs(device) for x in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return sum(x.nbytes for x in flat if isinstance(x, Tensor))


def measure(case: Case, direction: str, device: torch.device, *, peers: bool = True) -> dict[str, Any]:
    """One row of the record: every variant's spread in seconds, or why it has none. Without ``peers`` ours alone."""
    prepare = {"forward": forward, "backward": backward}[direction]
    calls = calls_for(touched_bytes(case, direction, device))
    captured: dict[str, Captured] = {}
    failed: dict[str, str] = {}
    for name, run in variants(case).items():
        if not peers and name != "ours":
            continue
        try:
            captured[name] = capture(lambda run=run: prepare(run, case, device), calls)  # type: ignore[misc]
        except Exception as error:
            failed[name] = one_line(error)
            if is_lost(device):
                raise
    spreads = rounds(captured, SECONDS_A_ROW)
    del captured
    torch.cuda.empty_cache()
    return {
        "op": case.op,
        "label": case.label,
        "direction": direction,
        "source": source_of(case.op),
        "bytes": getattr(case, f"{direction}_bytes"),
        "flops": getattr(case, f"{direction}_flops"),
        "calls": calls,
        "seconds": {name: asdict(spread) for name, spread in spreads.items()},
        "failed": failed,
    }


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def is_lost(device: torch.device) -> bool:
    """Whether an error of CUDA's has made this process useless."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """How far ours is from the reference in float32, and how far it may be: twice what the reference in bf16 is."""
    head = {"op": case.op, "label": case.label, "source": source_of(case.op)}
    try:
        inputs = case.inputs(device)
        expected = _results(case, tuple(map(_upcast, inputs)), "reference")
        own, reference = (_error(_results(case, inputs, backend), expected) for backend in (OURS, "reference"))
    except Exception as error:
        if is_lost(device):
            raise
        return {**head, "ok": False, "why": one_line(error)}
    budget = 2 * reference + torch.finfo(torch.bfloat16).eps / 2
    found = {**head, "ok": own <= budget, "error": own, "budget": budget}
    return found if found["ok"] else {**found, "why": f"error {own:.2e} > {budget:.2e}"}


def _upcast(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_upcast, value))
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.detach().float().requires_grad_(value.requires_grad)
    return value


def _results(case: Case, inputs: tuple[Any, ...], backend: str) -> list[Tensor]:
    """Results and gradients; and of an op without gradients, what it wrote into the tensors that it was given."""
    copies = tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs)
    result = case.run(*copies, backend=backend)
    outputs = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]
    leaves, differentiable = leaves_of(copies), tensors_of(result)
    if not (leaves and differentiable):
        given = [(x, before) for x, before in zip(copies, inputs, strict=True) if isinstance(x, Tensor)]
        # The change, not the tensor: a cache of which a sixteenth is written is right in the rest whatever was written.
        return outputs + [x - before for x, before in given if x.dtype.is_floating_point]
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    grads = [torch.randn(x.shape, device=x.device, generator=generator).bfloat16().to(x) for x in differentiable]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(differentiable, leaves, grads))


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the relative errors of the tensors; infinite where one is not finite."""
    errors = [
        ((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item()
        for a, e in zip(actual, expected, strict=True)
    ]
    return max(error if error == error else float("inf") for error in errors)
