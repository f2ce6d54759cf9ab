"""qk_norm_rope_cached on every backend: against float64 and a loop over tokens that writes one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, library

from madformer.kernels import dispatch
from madformer.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_cached, qk_norm_rope_ref
from tests.helpers.testing import COMPILER, DEVICE, assert_op_matches, each_dtype

STATUSES = {status.backend: status for status in dispatch.report()}
CPU = torch.device("cpu")


def backend_param(backend: str, device: torch.device = DEVICE) -> Any:
    status = STATUSES[backend]
    return pytest.param(
        backend, device, id=backend, marks=pytest.mark.skipif(not status.available, reason=status.reason)
    )


TRITON, CPP, REFERENCE = backend_param("triton"), backend_param("cpp", CPU), backend_param("reference")
each_backend = pytest.mark.parametrize(("backend", "device"), [TRITON, CPP, REFERENCE])
each_kernel = pytest.mark.parametrize(("backend", "device"), [TRITON, CPP])

NUM_SLOTS = 10


def make_inputs(
    device: torch.device,
    positions: Sequence[int] = (4, 7),
    rows: Sequence[int] | None = None,
    *,
    num_rows: int | None = None,
    num_tokens: int = 3,
    parts: int = 3,
    num_heads: int = 2,
    head_dim: int = 8,
    axes: int = 2,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    batch, angles = len(positions), 7 * make(num_tokens, head_dim)
    caches = make(2, num_rows or batch, num_heads, max(NUM_SLOTS, num_tokens), head_dim, dtype=dtype)
    return {
        "qkv_BLC": make(batch, num_tokens, parts * num_heads * head_dim, dtype=dtype),
        "q_weight": 1 + make(head_dim) / 4,
        "k_weight": 1 + make(head_dim) / 4,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_cache_RHSD": caches[0],
        "v_cache_RHSD": caches[1],
        "positions_B": torch.tensor(positions, dtype=torch.int64, device=device),
        "rows_B": None if rows is None else torch.tensor(rows, dtype=torch.int64, device=device),
        "num_heads": num_heads,
        "axes": axes,
    }


Results = tuple[Tensor | None, Tensor, Tensor]


def one_token_at_a_time(
    qkv_BLC: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache_RHSD: Tensor,
    v_cache_RHSD: Tensor,
    positions_B: Tensor,
    rows_B: Tensor | None,
    **scalars: Any,
) -> Results:
    """The truth, with the caches as results; it writes where Python's own integers say."""
    q, *new = qk_norm_rope_ref([qkv_BLC], [q_weight], [k_weight], [cos], [sin], **scalars)
    caches = [k_cache_RHSD.clone(), v_cache_RHSD.clone()]
    rows = range(len(positions_B)) if rows_B is None else rows_B.tolist()
    for cache, tokens_BHLD in zip(caches, new, strict=True):
        for row, start, tokens in zip(rows, positions_B.tolist(), tokens_BHLD.unbind(0), strict=True):
            for slot, token in enumerate(tokens.unbind(1), start):
                if 0 <= row < cache.shape[0] and 0 <= slot < cache.shape[2]:
                    cache[row, :, slot] = token
    return q if q.shape[2] else None, caches[0], caches[1]


def run(backend: str, op: Callable[..., Tensor | None] = qk_norm_rope_cached) -> Callable[..., Results]:
    """The op on copies of the caches, of the same strides, which become results."""

    def results(k_cache_RHSD: Tensor, v_cache_RHSD: Tensor, **rest: Any) -> Results:
        k_cache, v_cache = (torch.empty_like(cache).copy_(cache) for cache in (k_cache_RHSD, v_cache_RHSD))
        q = op(k_cache_RHSD=k_cache, v_cache_RHSD=v_cache, **rest, backend=backend)
        return q, k_cache, v_cache

    return results


def check(backend: str, inputs: dict[str, Any]) -> None:
    assert_op_matches(run(backend), one_token_at_a_time, inputs)


@each_backend
@each_dtype
def test_matches_float64(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    check(backend, make_inputs(device, dtype=dtype))


@each_kernel
@pytest.mark.parametrize(("head_dim", "axes"), [(8, 1), (16, 2), (64, 1), (64, 2), (72, 2), (80, 1), (96, 3), (128, 2)])
def test_head_dims(backend: str, device: torch.device, head_dim: int, axes: int) -> None:
    check(backend, make_inputs(device, (4,), head_dim=head_dim, axes=axes, dtype=torch.bfloat16))


@each_backend
def test_without_queries(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, parts=2)
    check(backend, inputs)
    assert run(backend)(**inputs)[0] is None
    # What nobody normalises has no weight.
    check(backend, inputs | {"q_weight": torch.full((8,), float("nan"), device=device)})


@each_kernel
@each_dtype
def test_equals_the_uncached_op(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Bit for bit: sampling attends to the very keys that training does."""
    inputs = make_inputs(device, head_dim=64, dtype=dtype)
    streams = {name: [inputs[name]] for name in ("q_weight", "k_weight", "cos", "sin")}
    expected = qk_norm_rope([inputs["qkv_BLC"]], **streams, num_heads=2, axes=2, backend=backend)
    q, *caches = run(backend)(**inputs)
    assert q is not None
    assert torch.equal(q, expected[0])
    for cache, new in zip(caches, expected[1:], strict=True):
        assert all(torch.equal(cache[row, :, at : at + 3], new[row]) for row, at in enumerate((4, 7)))


INDICES: dict[str, tuple[torch.dtype, Sequence[int], Sequence[int] | None]] = {
    "at the end of the cache": (torch.int32, (7, 9), None),
    "behind it": (torch.int32, (10, 2**31 - 1), None),
    "before it": (torch.int64, (-1, -(2**40)), None),
    "some rows of many": (torch.int32, (0, 7, 3), (4, 0, 2)),
    "one row, other slots": (torch.int64, (0, 3, 6), (1, 1, 1)),
    "a row that is not there": (torch.int32, (0, 0, 0), (5, 1, -1)),
    "no row that is there": (torch.int64, (0, 1, 2), (5, -1, 2**40)),
    # Of the dropped ones some would meet what is written if rows and slots were taken modulo their number.
    "rows and slots outside": (torch.int64, (9, -1, 0, 0), (0, 0, 5, -5)),
}


@each_backend
@pytest.mark.parametrize("indices", INDICES)
def test_stays_inside(backend: str, device: torch.device, indices: str) -> None:
    """What has a place is written there, all else stays bit for bit, before and behind the caches too."""
    dtype, positions, rows = INDICES[indices]
    num_rows = len(positions) if rows is None else 5
    inputs = make_inputs(device, positions, rows, num_rows=num_rows)
    inputs |= {name: inputs[name].to(dtype) for name in ("positions_B", "rows_B") if inputs[name] is not None}
    memory = torch.full((2, num_rows + 2, 2, NUM_SLOTS, 8), 7.0, device=device)
    memory[:, 1:-1] = torch.stack((inputs["k_cache_RHSD"], inputs["v_cache_RHSD"]))
    before = memory.clone()
    inputs |= {"k_cache_RHSD": memory[0, 1:-1], "v_cache_RHSD": memory[1, 1:-1]}
    expected = one_token_at_a_time(**inputs)
    q = qk_norm_rope_cached(**inputs, backend=backend)

    torch.testing.assert_close(q, expected[0])
    torch.testing.assert_close(memory[0, 1:-1], expected[1])
    assert torch.equal(memory[1, 1:-1], expected[2])  # Values are copied.
    untouched = memory == before
    inside = torch.stack(expected[1:]) == before[:, 1:-1]
    assert torch.equal(untouched[:, 1:-1], inside)
    assert untouched[:, 0].all()
    assert untouched[:, -1].all()


@each_backend
def test_rows_change_nothing_but_the_place(backend: str, device: torch.device) -> None:
    """In-flight batching: a sample computes the same bits whichever row it works on, in whatever company."""
    inputs = make_inputs(device, (1, 4), dtype=torch.bfloat16)
    q, k, v = run(backend)(**inputs)
    alone = {
        name: inputs[name][1:] for name in ("qkv_BLC", "k_cache_RHSD", "v_cache_RHSD", "positions_B")
    }  # The second sample
    assert q is not None
    for rows in ([0], [1], [2]):
        caches = {name: alone[name].repeat(3, 1, 1, 1) for name in ("k_cache_RHSD", "v_cache_RHSD")}
        placed = run(backend)(**inputs | alone | caches | {"rows_B": torch.tensor(rows, device=device)})
        expected = q[1:], k[1:], v[1:]
        assert placed[0] is not None
        assert torch.equal(placed[0], expected[0])
        assert all(torch.equal(now[rows], then) for now, then in zip(placed[1:], expected[1:], strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one layer of several": lambda x: torch.stack((x, x, x), dim=1)[:, 1],
    "longer than asked": lambda x: torch.cat((x, x), dim=2)[:, :, :NUM_SLOTS],
}


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_caches(backend: str, device: torch.device, layout: str) -> None:
    inputs = make_inputs(device)
    check(backend, inputs | {name: LAYOUTS[layout](inputs[name]) for name in ("k_cache_RHSD", "v_cache_RHSD")})


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a span of a longer sequence": lambda x: x.repeat(1, 2, 1)[:, 2:5],
    "columns of a wider one": lambda x: x.repeat(1, 1, 2)[..., 48:],
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(2, -1, -1),
}


@each_kernel
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_layouts_of_the_projection(backend: str, device: torch.device, projection: str) -> None:
    inputs = make_inputs(device)
    check(backend, inputs | {"qkv_BLC": PROJECTIONS[projection](inputs["qkv_BLC"])})


@each_kernel
def test_layouts_of_the_indices(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, (4, 4), (0, 2), num_rows=3)
    table = torch.tensor([[0, 9], [2, 9]], device=device)
    check(backend, inputs | {"positions_B": inputs["positions_B"][:1].expand(2), "rows_B": table[:, 0]})


@each_backend
def test_options(backend: str, device: torch.device) -> None:
    """Tables of each sample, in float64, the released pairing; without norm; without rotation; without either."""
    inputs = make_inputs(device, axes=1)
    tables = {name: torch.stack([inputs[name].roll(shift, 0) for shift in range(2)]) for name in ("cos", "sin")}
    no_norm, no_rotation = {"q_weight": None, "k_weight": None}, {"cos": None, "sin": None}
    check(backend, inputs | tables)
    check(backend, inputs | {name: table.double().mT.contiguous().mT for name, table in tables.items()})
    check(backend, inputs | {name: inputs[name].bfloat16() for name in ("q_weight", "k_weight")})
    check(backend, inputs | no_norm)
    check(backend, inputs | no_rotation)
    q, _, v_cache = run(backend)(**inputs | no_norm | no_rotation)
    expected = inputs["qkv_BLC"].unflatten(-1, (3, 2, 8))
    assert q is not None
    assert torch.equal(q.transpose(1, 2), expected[:, :, 0])
    assert torch.equal(v_cache[0, :, 4:7].transpose(0, 1), expected[0, :, 2])


@each_backend
@pytest.mark.parametrize("positions", [(), (4, 7)], ids=["no samples", "no tokens"])
def test_nothing_to_do(backend: str, device: torch.device, positions: Sequence[int]) -> None:
    inputs = make_inputs(device, positions, positions, num_rows=2, num_tokens=0 if positions else 3)
    q, *caches = run(backend)(**inputs)
    assert q is not None
    assert q.shape == (len(positions), 2, inputs["qkv_BLC"].shape[1], 8)
    assert torch.equal(caches[0], inputs["k_cache_RHSD"])
    assert torch.equal(caches[1], inputs["v_cache_RHSD"])


@pytest.mark.parametrize(("backend", "device"), [CPP])
def test_threads_share_the_tokens(backend: str, device: torch.device) -> None:
    """More than one thread's worth of work gives the same bits as one thread does."""
    inputs = make_inputs(device, (0, 5, 9), num_tokens=70, num_heads=4, head_dim=64, dtype=torch.bfloat16)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = run(backend)(**inputs)
        torch.set_num_threads(1)
        alone = run(backend)(**inputs)
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(x, y) for x, y in zip(shared, alone, strict=True))
    check(backend, inputs)


@each_kernel
def test_addresses_beyond_31_bits(backend: str, device: torch.device) -> None:
    """The second row of the caches lies 2**31 elements behind the first; on a CPU only the pages that are used are."""
    shape = 2, 2, NUM_SLOTS, 8
    inputs = make_inputs(device, (4,), (1,), num_rows=2, dtype=torch.bfloat16)
    near, far = [], []
    for _ in range(2):
        size = 2**31 + 2 * NUM_SLOTS * 8
        memory = torch.from_numpy(np.zeros(size, np.int16)) if device.type == "cpu" else zeros(size, dtype=torch.int16)
        far.append(memory.view(torch.bfloat16).as_strided(shape, (2**31, NUM_SLOTS * 8, 8, 1)))
        near.append(torch.zeros(shape, dtype=torch.bfloat16, device=device))
    for k_cache, v_cache in (near, far):
        qk_norm_rope_cached(**inputs | {"k_cache_RHSD": k_cache, "v_cache_RHSD": v_cache}, backend=backend)
    assert near[0][1, :, 4:7].count_nonzero() == 2 * 3 * 8
    assert all(map(torch.equal, near, far))


def op_arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """As the registered ops name them."""
    head_dim = inputs["k_cache_RHSD"].shape[3]
    return {name.rpartition("_")[0] if name[-1].isupper() else name: x for name, x in inputs.items()} | {
        "head_dim": head_dim,
        "eps": 1e-6,
    }


@pytest.mark.parametrize(
    ("op", "device"),
    [
        pytest.param("qk_norm_rope_cached", DEVICE, marks=TRITON.marks, id="triton"),
        pytest.param("qk_norm_rope_cached_cpp", CPU, marks=CPP.marks, id="cpp"),
    ],
)
def test_opcheck(op: str, device: torch.device) -> None:
    for rows, parts in (None, 3), ([2], 2):
        inputs = make_inputs(device, (4,), rows, num_rows=rows and 3, parts=parts)
        library.opcheck(getattr(torch.ops.madformer, op).default, (), op_arguments(inputs))


@each_kernel
def test_compiles_whole(backend: str, device: torch.device) -> None:
    compiler = COMPILER if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(qk_norm_rope_cached, fullgraph=True, backend=compiler)
    with torch.no_grad():
        inputs = make_inputs(device, (4, 7), (2, 0), num_rows=3)
        assert_op_matches(run(backend, compiled), one_token_at_a_time, inputs)


@pytest.mark.parametrize(("backend", "device"), [CPP])
def test_compiled_op_guards_its_memory_without_the_public_function(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device, (4, 7), (2, 0), num_rows=3)
    torch.ops.madformer.qk_norm_rope_cached_cpp(**op_arguments(inputs))
    for change in (
        {"qkv_BLC": zeros(2, 3, 47, device=device)},
        {"qkv_BLC": zeros(2, 3, 48, dtype=torch.int32, device=device)},
        {"q_weight": zeros(7, device=device)},
        {"k_weight": zeros(8, device=device).double()},
        {"cos": zeros(2, 8, device=device)},
        {"cos": None},
        {"sin": zeros(3, 8, device=device).half()},
        {"sin": zeros(3, 3, 8, device=device)},
        {"k_cache_RHSD": zeros(3, 2, NUM_SLOTS, 4, device=device)},
        {"v_cache_RHSD": zeros(3, 2, NUM_SLOTS - 1, 8, device=device)},
        {"v_cache_RHSD": zeros(3, NUM_SLOTS, 2, 8, device=device).transpose(1, 2)},
        {"v_cache_RHSD": zeros(3, 2, NUM_SLOTS, 8, device=device).half()},
        {"positions_B": zeros(2, device=device)},
        {"positions_B": zeros(1, dtype=torch.int64, device=device)},
        {"rows_B": zeros(3, dtype=torch.int64, device=device)},
        {"rows_B": None},
        {"num_heads": 3},
    ):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.madformer.qk_norm_rope_cached_cpp(**op_arguments(inputs | change))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nothing_waits_for_the_device(backend: str) -> None:
    inputs = make_inputs(DEVICE, (4, 7), (2, 0), num_rows=3)
    qk_norm_rope_cached(**inputs, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        qk_norm_rope_cached(**inputs, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_kernel
def test_integers_are_refused(backend: str, device: torch.device) -> None:
    inputs = make_inputs(device)
    integers = {name: inputs[name].int() for name in ("qkv_BLC", "k_cache_RHSD", "v_cache_RHSD")}
    with pytest.raises(ValueError, match=r"qkv must be torch.float32 or"):
        qk_norm_rope_cached(**inputs | integers, backend=backend)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **({"device": DEVICE} | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv_BLC": zeros(3, 3, 90)}, r"qkv must have the shape \(3, L, 96 or 64\)"),
        ({"k_cache_RHSD": zeros(3, 2, 2, 16)}, "k_cache must be .* with S of at least 3"),
        ({"k_cache_RHSD": zeros(2, 2, 10, 16)}, r"k_cache must have the shape \(3, 2, 10, 16\)"),
        ({"v_cache_RHSD": zeros(3, 2, 9, 16)}, r"v_cache must have the shape \(3, 2, 10, 16\)"),
        ({"v_cache_RHSD": zeros(3, 2, 10, 16).half()}, "v_cache must be torch.float32"),
        ({"v_cache_RHSD": zeros(3, 10, 2, 16).transpose(1, 2)}, "v_cache must have contiguous channels and k_cache's"),
        ({"k_cache_RHSD": zeros(3, 2, 10, 16, device="meta")}, "k_cache must be on"),
        ({"positions_B": zeros(2, dtype=torch.int64)}, r"positions must have the shape \(3,\)"),
        ({"positions_B": zeros(3)}, "positions must be torch.int32 or torch.int64"),
        ({"positions_B": zeros(3, dtype=torch.int64, device="meta")}, "positions must be on"),
        ({"rows_B": zeros(2, dtype=torch.int64)}, r"rows must have the shape \(3,\)"),
        ({"rows_B": zeros(3)}, "rows must be torch.int32 or torch.int64"),
        ({"rows_B": zeros(3, dtype=torch.int32, device="meta")}, "rows must be on"),
        (
            {"rows_B": zeros(3, dtype=torch.int32), "k_cache_RHSD": zeros(0, 2, 10, 16)},
            "k_cache must have at least one row",
        ),
        (
            {"rows_B": zeros(3, dtype=torch.int32), "v_cache_RHSD": zeros(4, 2, 10, 16)},
            r"v_cache must have the shape \(3, 2, 10, 16\)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    inputs = make_inputs(DEVICE, (4, 0, 7), head_dim=16)
    before = inputs["k_cache_RHSD"].clone()
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_cached(**inputs | change)
    assert torch.equal(inputs["k_cache_RHSD"], before)
