"""Runs of the command line that a certain call ends by SIGKILL; and, as a program, the process that they fork from.

python -m tests.helpers.killing RUNS
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.helpers import environment


class Kill(NamedTuple):
    """At the ``number``-th call of the named functions together, in whatever thread; ``after``: when it has ended."""

    number: int
    after: bool
    functions: Sequence[str]


def statuses(runs: Sequence[tuple[Sequence[str], Kill | None]]) -> list[int]:
    """Of ``madformer`` with each run's arguments, one run after the other: ``-signal.SIGKILL`` for a killed one."""
    command = [sys.executable, "-m", __name__, json.dumps(runs)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    print(result.stderr)
    assert result.returncode == 0
    return json.loads(result.stdout.splitlines()[-1])


def _forked(arguments: list[str], kill: list[Any] | None) -> int:
    import torch

    from madformer.cli.main import main

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    torch.set_num_threads(1)
    if kill is not None:
        _arm(Kill(*kill))
    os._exit(main(arguments))


def _arm(kill: Kill) -> None:
    calls = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number = next(calls)
            if number == kill.number and not kill.after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if number == kill.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    for name in kill.functions:
        module, _, attribute = name.rpartition(".")
        owner = pkgutil.resolve_name(module)
        setattr(owner, attribute, counted(getattr(owner, attribute)))


if __name__ == "__main__":
    # before torch has threads, so that one import serves all forks
    for imported in ("bulk", "data.encoding", "engine.precision", "pipeline"):
        importlib.import_module(f"madformer.{imported}")
    print(json.dumps([_forked(*run) for run in json.loads(sys.argv[1])]))
