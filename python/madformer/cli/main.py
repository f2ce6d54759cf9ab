"""The ``madformer`` command: one file a subcommand, each with a :class:`~madformer.cli.request.Request` that runs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from madformer.cli.advise import Advise
from madformer.cli.bench import Bench
from madformer.cli.config_file import toml
from madformer.cli.convert import Convert
from madformer.cli.data import Clipart, Emoji, Latents
from madformer.cli.evaluate import Evaluate
from madformer.cli.export import Export
from madformer.cli.info import Info
from madformer.cli.process import exit_status, output_is_closed, settle_streams, terminable
from madformer.cli.report import Report
from madformer.cli.request import OPTIONS, Request, refuse, refusing
from madformer.cli.sample import Sample
from madformer.cli.serve import Serve
from madformer.cli.sweep import SweepRequest
from madformer.cli.train import Train
from madformer.files.atomic import file_locks
from madformer.objects import with_nearest


@dataclass(frozen=True, kw_only=True)
class Completion(Request):
    """Print a script that lets a shell complete commands and options.

    examples:
      madformer completion bash > ~/.local/share/bash-completion/completions/madformer
      madformer completion fish > ~/.config/fish/completions/madformer.fish
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], Positional, arg(metavar="SHELL")]  # whose script it is

    def run(self) -> None:
        with contextlib.suppress(SystemExit):
            _tell(["--tyro-print-completion", self.shell])


# with a line for the list of commands
COMMANDS: dict[str, tuple[type[Request], str]] = {
    "sample": (Sample, "draw images from a model"),
    "evaluate": (Evaluate, "say how good images are, a folder's or a model's"),
    "sweep": (SweepRequest, "train, sample and judge a grid of models and settings"),
    "report": (Report, "make one page of a sweep: figures, samples and its table"),
    "advise": (Advise, "propose block count and split, by what latents say and what was measured"),
    "serve": (Serve, "serve a model over HTTP: a page, and OpenAI's images API"),
    "train": (Train, "train a model"),
    "data emoji": (Emoji, "render Noto Color Emoji"),
    "data clipart": (Clipart, "make the pictures of a package of clip art"),
    "data latents": (Latents, "encode images once, so that training needs no VAE"),
    "export": (Export, "take a model out of a training run"),
    "convert": (Convert, "turn a released checkpoint into a model folder"),
    "info": (Info, "show what runs here, what a model is, or how a picture was drawn"),
    "bench": (Bench, "measure latency and throughput of sampling"),
    "completion": (Completion, "print a script for the completion of commands and options in a shell"),
}
GROUPS = {"data": "make a data set"}
DESCRIPTION = """Images made block by block: autoregression across blocks, diffusion within.

First steps: madformer sample --model assets/emoji64 --prompt "red apple" --grid apple.png"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input is one line on stderr and exit status 1, a signal the status that the shell has for it.

    From any thread; signals end it in the process's first one.

    Raises:
        SystemExit: words that are no command's, with status 2, or a call for help.
    """
    try:
        file_locks()
    except OSError as error:
        print(f"madformer: error: {error}", file=sys.stderr)
        return 1
    settle_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), "")
    if not name:
        _tell(words)
    program = f"madformer {words[0]}"
    try:
        with terminable():
            request = COMMANDS[name][0].parse(words[len(name.split()) :], f"madformer {name}")
            if request.print_config:
                print(toml(request.described()))
            else:
                request.run()
            # here, where a full disk or a closed pipe is an error like others
            sys.stdout.flush()
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 128 + signal.SIGPIPE
        if os.environ.get("MADFORMER_TRACEBACK") or not _is_for_the_user(error):
            raise
        message = " ".join(str(error).split()) or "out of memory"
        print(f"{program}: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"{program}: interrupted", file=sys.stderr)
        return exit_status(stop)
    return 0


def _tell(words: Sequence[str]) -> NoReturn:
    """Say what there is, or what is wrong with words that name no command, and end."""
    group = next((word for word in words[:1] if word in GROUPS), "")
    known = [name.removeprefix(f"{group} ").split()[0] for name in COMMANDS if name.startswith(group)]
    given = words[1:2] if group else words[:1]
    if not given:
        refuse(f"madformer {group}".strip(), f"a command is missing: there are {', '.join(dict.fromkeys(known))}")
    if not given[0].startswith("-"):
        refuse(f"madformer {group}".strip(), f"unknown command {with_nearest(given[0], known)}")
    with refusing("madformer", ["--help"]):
        tyro.cli(_union(COMMANDS), prog="madformer", description=DESCRIPTION, args=words, **OPTIONS)
    raise SystemExit(0)


def _union(commands: dict[str, tuple[type[Request], str]]) -> Any:
    kinds: dict[str, Any] = {}
    for name, (kind, line) in commands.items():
        first, *rest = name.split()
        if rest:
            within = {name.removeprefix(f"{first} "): c for name, c in commands.items() if name.startswith(f"{first} ")}
            kinds[first] = Annotated[_union(within), subcommand(first, description=GROUPS[first])]
        else:
            kinds[first] = Annotated[kind.form(), subcommand(first, description=line)]
    return Union[tuple(kinds.values())]  # noqa: UP007 - of a tuple


def _is_for_the_user(error: Exception) -> bool:
    """Of the errors of running code, those that another option avoids."""
    from madformer.engine.memory import OutOfMemoryError
    from madformer.kernels.dispatch import BackendUnavailableError

    if "can't allocate memory" in str(error) or "out of memory" in str(error):
        return True
    return not isinstance(error, RuntimeError) or isinstance(error, (BackendUnavailableError, OutOfMemoryError))


if __name__ == "__main__":
    sys.exit(main())
