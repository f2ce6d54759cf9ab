"""A set of whole numbers, most of them neighbours, in a bit each."""

from __future__ import annotations

from collections.abc import Iterator

# bits of one of the integers that the set is made of: more are slower to add to, fewer take more memory around them
_WIDTH = 1024


class NumberSet:
    """Numbers from 0 on. Ten million that lie together take 1.4 MB."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}

    def add(self, number: int) -> None:
        place, bit = divmod(number, _WIDTH)
        self._bits[place] = self._bits.get(place, 0) | 1 << bit

    def update(self, numbers: range) -> None:
        """Add numbers that follow each other."""
        for place, mask in _masks(numbers):
            self._bits[place] = self._bits.get(place, 0) | mask

    def issuperset(self, numbers: range) -> bool:
        """Whether numbers that follow each other are all there; stops at the first that is not."""
        return all(self._bits.get(place, 0) & mask == mask for place, mask in _masks(numbers))

    @property
    def end(self) -> int:
        """One more than the largest; 0 where there is none."""
        place = max(self._bits, default=None)
        return 0 if place is None else place * _WIDTH + self._bits[place].bit_length()

    def __len__(self) -> int:
        return sum(bits.bit_count() for bits in self._bits.values())

    def __contains__(self, number: int) -> bool:
        return self.issuperset(range(number, number + 1))

    def __iter__(self) -> Iterator[int]:
        """In order."""
        for place in sorted(self._bits):
            bits = self._bits[place]
            while bits:
                lowest = bits & -bits
                yield place * _WIDTH + lowest.bit_length() - 1
                bits ^= lowest


def _masks(numbers: range) -> Iterator[tuple[int, int]]:
    """The integers that hold them, each with their bits in it."""
    first = numbers.start
    while first < numbers.stop:
        place, bit = divmod(first, _WIDTH)
        count = min(numbers.stop - first, _WIDTH - bit)
        yield place, ((1 << count) - 1) << bit
        first += count
