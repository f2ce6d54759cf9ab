"""The ``madformer`` command: one file a subcommand, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from madformer.cli import bench, convert, data, export, info, sample, train
from madformer.cli.process import Parser, exit_status, output_is_closed, settle_streams, terminable
from madformer.files.atomic import file_locks

COMMANDS = (sample, train, data, export, convert, info, bench)


def build_parser() -> Parser:
    parser = Parser(
        prog="madformer",
        description="Images made block by block: autoregression across blocks, diffusion within.",
        epilog='First steps: madformer sample --model assets/emoji64 --prompt "red apple" --grid apple.png',
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one line on stderr and exit status 1, a signal the status that the shell has for it.

    From any thread; signals end it in the process's first one.
    """
    try:
        file_locks()
    except OSError as error:
        print(f"madformer: error: {error}", file=sys.stderr)
        return 1
    settle_streams()
    args = build_parser().parse_args(arguments)
    try:
        with terminable():
            args.run(args)
            # here, where a full disk or a closed pipe is an error like others
            sys.stdout.flush()
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 128 + signal.SIGPIPE
        if os.environ.get("MADFORMER_TRACEBACK") or not _is_for_the_user(error):
            raise
        message = " ".join(str(error).split()) or "out of memory"
        print(f"madformer {args.command}: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"madformer {args.command}: interrupted", file=sys.stderr)
        return exit_status(stop)
    return 0


def _is_for_the_user(error: Exception) -> bool:
    """Of the errors of running code, those that another option avoids."""
    from madformer.engine.memory import OutOfMemoryError
    from madformer.kernels.dispatch import BackendUnavailableError

    if "can't allocate memory" in str(error) or "out of memory" in str(error):
        return True
    return not isinstance(error, RuntimeError) or isinstance(error, (BackendUnavailableError, OutOfMemoryError))


if __name__ == "__main__":
    sys.exit(main())
