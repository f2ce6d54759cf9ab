"""What the other tests of this folder rely on: a host read and a copy between devices are seen, wherever they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.fake_gpu import GPU, Watch

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "if": lambda x: 1 if x.any() else 0,
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.sum().tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.__setitem__(x > 0, torch.ones(3, device=GPU)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=GPU), dim=0),
}
COPIES: dict[str, Callable[[Tensor], object]] = {
    "cpu": lambda x: x.cpu(),
    "to": lambda x: torch.zeros(4, 4).to(x.device),
    "to, not waiting": lambda x: torch.zeros(4, 4).to(x.device, non_blocking=True),
    "copy_": lambda x: x.copy_(torch.zeros(4, 4)),
    "of a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "a scalar of the CPU": lambda x: x * torch.tensor(2.0),
    "index": lambda x: x[torch.tensor([0, 1])],
}


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("name", [*READS, *COPIES])
def test_planted_faults_are_seen(name: str) -> None:
    x = torch.zeros(4, 4, device=GPU)
    with Watch() as watch, contextlib.suppress(Exception):  # fake tensors refuse what depends on values
        (READS | COPIES)[name](x)
    assert watch.found, watch.ops


@pytest.mark.usefixtures("mode")
def test_what_stays_on_the_device_is_no_fault() -> None:
    x = torch.zeros(4, 4, device=GPU)
    with Watch() as watch:
        torch.where(x > 0, x, 0.0).index_select(0, torch.zeros(2, dtype=torch.int64, device=GPU)).add_(1)
        x[:, 1:] = x[:, :-1] @ torch.zeros(3, 3, device=GPU)
        x.masked_fill_(x > 0, 1.0)
        (x.max() > 0).float()
    assert not watch.found
    assert watch.ops["aten.index_select.default"] == 1
