"""Compiled steps of images in flight: whichever slots a step has, at whichever blocks.

A program (:mod:`.compiled`) computes all rows of a batch of one size. Here what a step reads of its rows is copied into
such a batch, filled up with one of them where there are fewer, and the result is that of the rows alone. It is all
copied anew at every step: nothing of an image is kept beside the slots and the cache. A batch is what a plan of so many
images has, and their programs are the same.

Shape legend: B samples of a pass, N rows of the cache that they have, L latents of a block, C channels, E time
embedding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from madformer.engine.compiled import CompiledPasses, seen
from madformer.engine.passes import Passes
from madformer.engine.pool import ModelKind
from madformer.model.madformer import MADFormer


class CompiledRows(Passes):
    """The passes of some rows, whose steps are programs where there are such for batches of so many or more.

    Args:
        kind: what the batches are allocated for. Others: as :class:`~madformer.engine.passes.Passes` has them.
    """

    def __init__(self, kind: ModelKind, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kind = kind
        # by how many of PyTorch's threads they are made for, and size, one for each thread that computes at a time:
        # whoever computes with one takes it out meanwhile
        self._batches: dict[tuple[int, int], list[CompiledPasses]] = {}
        # how many of each there are
        self._made_for: dict[tuple[int, int], int] = {}
        self._usable = False

    def follow(self, model: MADFormer) -> None:
        super().follow(model)
        for batch in self._all():
            batch.follow(model)

    def look_at(
        self, model: MADFormer, workers: int, threads: int, *, lone: Collection[int] = (), try_out: bool
    ) -> None:
        """Compute with the programs of a model that there are; it is the one that :meth:`follow` was given.

        Args:
            workers: threads that compute at a time, each up to its part of the slots. threads: of PyTorch's, that each
                has. lone: of PyTorch's, other numbers that a single image may be computed by, while nobody else
                computes. try_out: make programs that there are not, in minutes.
        """
        largest = -(-len(self.slots.block_R) // workers)
        wanted = {(number, 1): 1 for number in sorted(lone)} | {(threads, size): workers for size in sizes_to(largest)}
        if self._made_for != wanted:
            self._batches = {
                (number, size): [self._batch(size) for _ in range(count)] for (number, size), count in wanted.items()
            }
            self._made_for = wanted
        # all or none: of what was not looked at nobody knows what it computes with
        self._usable, built = False, seen(model)
        for (number, _), batches in self._batches.items():
            for batch in batches:
                batch.look_at(model, built, number, try_out=try_out)
                if batch.program is None:
                    return  # nor would the others have one, and each would tell why
        self._usable = True

    def first_block(self, rows_B: Tensor | None) -> None:
        # as in CompiledPasses: of the slot's last image
        self.cache.clear(self._cache_rows(rows_B), self.config.ar_layers)
        super().first_block(rows_B)

    def predict(
        self,
        rows_B: Tensor | None,
        latents_BLC: Tensor,
        down_BE: Tensor,
        up_BE: Tensor,
        time_BC: Tensor,
        *,
        refresh: bool = True,
    ) -> tuple[Tensor, ...]:
        count, given = len(latents_BLC), (latents_BLC, down_BE, up_BE, time_BC)
        batches = self._fitting(count)
        try:
            batch = batches.pop()
        except IndexError:  # there are none, or others compute with all of them
            return super().predict(rows_B, *given, refresh=refresh)
        try:
            filled_B = torch.arange(len(batch.slots.block_R)).clamp_(max=count - 1)
            self._copy(filled_B if rows_B is None else rows_B[filled_B], batch)
            outputs = batch.predict(None, *(tensor[filled_B] for tensor in given))
        finally:
            batches.append(batch)
        return tuple(output[:count] for output in outputs)

    def _all(self) -> list[CompiledPasses]:
        return [batch for batches in self._batches.values() for batch in batches]

    def _batch(self, size: int) -> CompiledPasses:
        # the schedules stay where they are
        slots, cache = self._kind.allocate(size, 1, guided=self.branches > 1)
        batch = CompiledPasses(self.model, cache, slots, self.clip, "auto")
        batch.follow(self.model)
        return batch

    def _fitting(self, count: int) -> list[CompiledPasses]:
        """Batches for so many images, with programs that were made for the threads that the caller has."""
        if not self._usable:
            return []
        threads = torch.get_num_threads()
        return next((each for (made, size), each in self._batches.items() if made == threads and size >= count), [])

    def _copy(self, rows_B: Tensor, batch: CompiledPasses) -> None:
        """What a step reads of these rows."""
        rows_N = self._cache_rows(rows_B)
        assert rows_N is not None
        mine, its = (
            (*self._cached(passes), passes.cache.condition_RLC, passes.cache.lengths_R,
             passes.cos_RSD, passes.sin_RSD, passes.slots.class_NC)
            for passes in (self, batch)
        )  # fmt: skip
        for tensor, copied in zip(mine, its, strict=True):
            torch.index_select(tensor, 0, rows_N, out=copied)

    def _cached(self, passes: Passes) -> list[Tensor]:
        """Keys and values that diffusion layers read."""
        cache, ar_layers = passes.cache, self.config.ar_layers
        return [*cache.keys_RHSD[ar_layers:], *cache.values_RHSD[ar_layers:]]


def sizes_to(largest: int) -> list[int]:
    """Of batches: powers of two, and the largest."""
    return sorted({*(1 << power for power in range(largest.bit_length())), largest})
