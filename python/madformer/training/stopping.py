"""Ending a run in good order: what asked for it, and that all processes agree."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from madformer.training.parallel import World

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Ending:
    """Why a run ends before its last step.

    Attributes:
        asked: somebody wants it to.
        signal: whose number is the one of the signal that did, or 0.
        failure: what kept this process from having the next step's data.
        failed_elsewhere: whether another process has a failure.
    """

    asked: bool = False
    signal: int = 0
    failure: Exception | None = None
    failed_elsewhere: bool = False

    def agreed(self, world: World) -> bool:
        """Whether any process ends: then all do, at the same step, for the same reason."""
        if world.size > 1:
            # between processors: the devices are not waited for
            mine = torch.tensor([int(self.asked), self.signal, int(self.failure is not None)])
            asked, number, failed = world.largest(mine).tolist()
            self.asked, self.signal, self.failed_elsewhere = bool(asked), number, bool(failed)
        return self.asked or self.failure is not None or self.failed_elsewhere

    def settle(self) -> None:
        """Raise what kept a process from going on; one that was asked to end has come to no harm.

        A process whose data are well ends with status 1 beside another one that says why.
        """
        if self.asked:
            return
        if self.failure is not None:
            raise self.failure
        if self.failed_elsewhere:
            raise SystemExit(1)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Be asked by SIGINT and SIGTERM; the second of them ends the process at once.

        Only a process's first thread may say what signals do. In any other they do what they did.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _: object) -> None:
            self.asked, self.signal = True, number
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            # a handler may run within a write of the logger's
            os.write(2, b"\nending after this step with a checkpoint; a second signal ends at once\n")

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
