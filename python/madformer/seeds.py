"""What a seed draws: one stream of random numbers for every seed from 0 to 2^63 - 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from madformer.arguments import whole_number

if TYPE_CHECKING:
    import torch

SEEDS = 1 << 63
# of a PyTorch generator on a CPU only these reach its Mersenne twister
_TORCH_SEEDS = 1 << 32
# of the bytes of its state: the seed, where it stands, and then the twister's words, 8 bytes for each 32 bits
_WORDS_AT, _NUM_WORDS = 24, 624


def check_seed(seed: SupportsIndex, count: int = 1) -> int:
    """The seed of the first of ``count`` images as a plain number; that of the last one is ``seed + count - 1``.

    Raises:
        ValueError: no whole number, or one of the seeds is below 0 or above 2^63 - 1.
    """
    first = whole_number("seed", seed)
    if not 0 <= first <= SEEDS - count:
        last = f", and with it the last of {count}" if count > 1 else ""
        raise ValueError(f"seed={first} must be from 0 to 2^63 - 1{last}")
    return first


def generator_of(seed: SupportsIndex) -> torch.Generator:
    """A generator on the CPU: PyTorch's own below 2^32, and from there on one that no other seed gives.

    ``manual_seed`` takes the low 32 bits of a larger seed. Here the twister starts from all of them, as its authors
    start it from more than one word (Matsumoto and Nishimura, 2002, ``init_by_array``, which NumPy has).

    Raises:
        ValueError: see :func:`check_seed`.
    """
    import numpy as np  # not above: the command line checks seeds before it loads PyTorch
    import torch

    number = check_seed(seed)
    generator = torch.Generator().manual_seed(number)
    if number >= _TORCH_SEEDS:
        state = generator.get_state()
        words = np.random.RandomState([number % _TORCH_SEEDS, number // _TORCH_SEEDS]).get_state(legacy=False)
        state.numpy()[_WORDS_AT:][: 8 * _NUM_WORDS].view(np.uint64)[:] = words["state"]["key"]
        generator.set_state(state)
    return generator


def seed_all(seed: SupportsIndex) -> None:
    """``torch.manual_seed``, with all bits of the seed on the CPU too.

    Raises:
        ValueError: see :func:`check_seed`.
    """
    import torch

    generator = generator_of(seed)
    torch.manual_seed(generator.initial_seed())
    torch.default_generator.set_state(generator.get_state())
