"""Who goes first: by priority, and within it clients by turns, each by what its images cost.

Start-time fair queueing (Goyal, Vin and Cheng, 1996): an image starts, in virtual time, when its client's image before
ends, or now; the one that starts first goes first. A client that asks for a hundred does not keep one from its first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PRIORITIES = 9
"""From minus this to this."""
_TIMES = 1 << 48


@dataclass
class FairRanks:
    """Ranks of images, lower first. ``now`` and ``ends``: virtual times of each priority, and of each client in it."""

    now: dict[int, int] = field(default_factory=dict)
    ends: dict[tuple[int, str], int] = field(default_factory=dict)

    def rank(self, client: str, priority: int, cost: int) -> int:
        """Of the next image of a client."""
        now = self.now.get(priority, 0)
        start = max(now, self.ends.get((priority, client), 0))
        self.ends[priority, client] = start + cost
        return priority * _TIMES + start

    def begun(self, rank: int) -> None:
        """Time goes on when an image begins to be drawn."""
        priority, start = divmod(rank, _TIMES)
        self.now[priority] = max(self.now.get(priority, 0), start)

    def forget(self) -> None:
        """Clients that have no more than anybody else; called where nobody waits."""
        self.ends = {key: end for key, end in self.ends.items() if end > self.now.get(key[0], 0)}
