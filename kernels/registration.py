"""Puts a kernel into PyTorch as an op of the library ``madformer``: dispatcher, fake tensors, autograd, and short way.

Each op is registered once, by :func:`register` or, with a gradient, :func:`register_differentiable`, and one that C++
implements by :func:`register_compiled`; what these return is what the public function calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

from madformer.kernels.plans import Compiled, Implementation, eager, recorded

DEVICES = ("cpu", "cuda")
"""On a CPU Triton's kernels are interpreted."""


def register(
    name: str, schema: str, implementation: Implementation, fake: Callable[..., Any], differentiable: Any = None
) -> Callable[..., Any]:
    """An op ``madformer::name``.

    Args:
        schema: of arguments and results, in PyTorch's notation; what is written to has an alias there.
        implementation: of :func:`~madformer.kernels.plans.planned`.
        fake: makes the outputs of the arguments without computing them.
        differentiable: the autograd function that :func:`~madformer.kernels.plans.recorded` makes, for an op with a
            gradient.

    Returns:
        The function that runs it, by the short way where there is one.
    """
    library.define(f"madformer::{name}", schema)
    library.impl(f"madformer::{name}", DEVICES, implementation)
    library.register_fake(f"madformer::{name}", fake)
    return eager(getattr(torch.ops.madformer, name), implementation, differentiable)


def register_differentiable(
    name: str,
    schema: str,
    implementation: Implementation,
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """:func:`register`, with a gradient.

    Args:
        setup_context, backward: as PyTorch's ``register_autograd`` takes them.
    """
    call = register(name, schema, implementation, fake, recorded(implementation, setup_context, backward))
    library.register_autograd(f"madformer::{name}", backward, setup_context=setup_context)
    return call


def register_compiled(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """An op that ``madformer._C`` implements, which registers itself for the CPU.

    One of its own where Triton has the op too: interpreted, its kernels stand beside these on a CPU.

    Args:
        schema, fake: as for :func:`register`.
        setup_context, backward: as for :func:`register_differentiable`; None for an op without a gradient.
    """
    library.define(f"madformer::{name}", schema)
    library.register_fake(f"madformer::{name}", fake)
    op = getattr(torch.ops.madformer, name).default
    implementation = Compiled(op)
    if setup_context is None or backward is None:
        return eager(op, implementation)
    library.register_autograd(f"madformer::{name}", backward, setup_context=setup_context)
    return eager(op, implementation, recorded(implementation, setup_context, backward))
