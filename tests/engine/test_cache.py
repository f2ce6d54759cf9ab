"""The conditioning cache: what was written where, for rows at different lengths, whatever the memory held before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from madformer.config import TextConfig, tiny
from madformer.engine.cache import ConditioningCache, _runs
from madformer.model.layer import Projections
from tests.helpers.testing import DEVICE, needs_triton

CONFIG = tiny().replace(num_heads=3, hidden_size=192, num_blocks=4, block_size=4, num_layers=2)
HEADS, HEAD_DIM, BLOCK = CONFIG.num_heads, CONFIG.head_dim, CONFIG.block_size
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


def make_cache(rows: int, backend: str, max_prefix: int = 0) -> ConditioningCache:
    text = TextConfig(vocab_size=1, length=max_prefix) if max_prefix else None
    config = CONFIG.replace(text=text)
    cache = ConditioningCache(config, rows, dtype=torch.float32, device=DEVICE, backend=backend)
    for tensor in (*cache.keys_RHSD, *cache.values_RHSD):
        tensor.fill_(torch.nan)
    return cache


def draw(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, HEADS, tokens, HEAD_DIM, generator=generator).to(DEVICE)
    return q, k, v


def unrotated(*heads_BHLD: Tensor, backend: str) -> Projections:
    """A projection to these heads, with neither norm nor rotation to come."""
    packed = torch.stack([x.transpose(1, 2) for x in heads_BHLD], dim=2).flatten(2)
    ones = torch.ones(heads_BHLD[0].shape[2], HEAD_DIM, device=packed.device)
    return Projections([packed], [None], [None], [(ones, torch.zeros_like(ones))], HEADS, axes=1, backend=backend)


# Whose kernels read positions and where these are has nothing to do with each other.
each_way = pytest.mark.parametrize(
    ("backend", "on_host"),
    [
        *[("reference", True), ("reference", False), pytest.param("triton", False, marks=needs_triton)],
        pytest.param("triton", True, marks=[needs_triton, pytest.mark.slow]),
    ],
)


@each_way
def test_overwrites_until_it_advances(backend: str, on_host: bool) -> None:
    """Attention sees the finished prefix and the newest write."""
    cache = make_cache(2, backend)
    cache.on_host &= on_host
    q, k, v = draw(2, 3 * BLOCK)
    for start in range(0, 3 * BLOCK, BLOCK):
        block, done = slice(start, start + BLOCK), slice(0, start + BLOCK)
        view = cache.view(None, BLOCK)
        view.attend(1, unrotated(*torch.full((3, 2, HEADS, BLOCK, HEAD_DIM), 7.0, device=DEVICE), backend=backend))
        attended = view.attend(1, unrotated(q[:, :, block], k[:, :, block], v[:, :, block], backend=backend))
        assert attended is not None
        expected = F.scaled_dot_product_attention(q[:, :, block], k[:, :, done], v[:, :, done])
        torch.testing.assert_close(attended, expected)
        cache.advance(BLOCK)
    assert cache.keys_RHSD[0].isnan().all(), "another layer was written"


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_and_values_without_queries(backend: str) -> None:
    cache = make_cache(1, backend)
    _, k, v = draw(1, BLOCK)
    assert cache.view(None, BLOCK).attend(0, unrotated(k, v, backend=backend)) is None
    torch.testing.assert_close(cache.keys_RHSD[0][:, :, :BLOCK], k)
    torch.testing.assert_close(cache.values_RHSD[0][:, :, :BLOCK], v)
    assert cache.keys_RHSD[0][:, :, BLOCK:].isnan().all()


@each_way
def test_rows_at_different_lengths(backend: str, on_host: bool) -> None:
    """A prefix of another length in each row (text), then blocks for some of the rows in any order."""
    cache = make_cache(4, backend, max_prefix=5)
    cache.on_host &= on_host
    keys: dict[int, list[Tensor]] = {row: [] for row in range(4)}
    values: dict[int, list[Tensor]] = {row: [] for row in range(4)}

    def write(rows: list[int], tokens: int, seed: int) -> None:
        q, k, v = draw(len(rows), tokens, seed)
        rows_B = torch.tensor(rows, device=DEVICE)
        attended = cache.view(rows_B, tokens).attend(0, unrotated(q, k, v, backend=backend))
        cache.advance(tokens, rows_B)
        assert attended is not None
        for index, row in enumerate(rows):
            keys[row].append(k[index : index + 1])
            values[row].append(v[index : index + 1])
            prefix = torch.cat(keys[row], dim=2), torch.cat(values[row], dim=2)
            expected = F.scaled_dot_product_attention(q[index : index + 1], *prefix)
            torch.testing.assert_close(attended[index : index + 1], expected)

    write([0], 5, seed=1)
    write([3], 2, seed=2)
    for seed, rows in enumerate(([3, 0], [1, 2], [2, 0, 3], [1])):
        write(rows, BLOCK, seed=seed + 3)
    assert cache.lengths_R.tolist() == [13, 8, 8, 10]
    cache.reset(torch.tensor([3, 1], device=DEVICE))
    assert cache.lengths_R.tolist() == [13, 0, 8, 0]
    keys[3], values[3] = [], []
    write([3], BLOCK, seed=9)
    cache.reset()
    assert cache.lengths_R.tolist() == [0, 0, 0, 0]


def test_bytes_are_counted() -> None:
    """Two tensors a layer for every row, 4 bytes each, the condition, and a length."""
    cache = make_cache(2, "reference", max_prefix=1)
    tokens = CONFIG.num_blocks * BLOCK + 1
    expected = 2 * 4 * (2 * CONFIG.num_layers * HEADS * tokens * HEAD_DIM + BLOCK * CONFIG.hidden_size + 1)
    assert cache.nbytes == expected


def test_rows_that_a_slice_reaches_are_one_call() -> None:
    spans = [(0, 5), (1, 5), (2, 5), (8, 5), (9, 5), (10, 5), (3, 5), (1, 5), (2, 7), (6, 7)]
    runs = _runs(spans)
    assert [count for *_, count in runs] == [3, 3, 1, 1, 2]
    reached = [(row, end) for rows, end, _ in runs for row in range(rows.start, rows.stop, rows.step)]
    assert reached == spans
    assert _runs([(3, 4), (11, 4)]) == [(slice(3, 12, 8), 4, 2)]
