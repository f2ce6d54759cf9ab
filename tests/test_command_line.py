"""What all commands have in common: help, options, and one line with exit status 2 for words that are none of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from madformer.cli.main import COMMANDS, main
from madformer.cli.request import options_of
from madformer.cli.sample import Sample
from madformer.cli.train import Train
from madformer.training.config import PRESETS


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """What is printed on the way to that exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert (stop.value.code or 0) == status
    captured = capsys.readouterr()
    if status:
        assert len(captured.err.splitlines()) == 1
        assert captured.out == ""
    return captured.err if status else captured.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_line_of_help_and_its_default(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # one column of boxes
    shown = said(capsys, *name.split(), "--help", status=0)
    told: dict[str, str] = {}
    for line in (line.strip("│ ") for line in shown.splitlines()):
        if option := re.match(r"--[a-z][\w.-]*", line):
            told[current := option[0]] = line
        elif told and line and not re.fullmatch(r"-+|.* options|[╭╰─].*", line):
            told[current] += f" {line}"
    options = options_of(COMMANDS[name][0].form())
    assert told.keys() == options.keys()
    for option, entry in told.items():
        text = re.sub(r"^--[\w.-]+(,? [A-Z,.]+(?=\s)| \{[\w,+]+\}|, --[\w.-]+)?", "", entry)
        text, _, default = text.rpartition("(")
        assert re.match(r"(default: .+|required|repeatable)\)", default), entry
        assert len(text.split()) >= 2, f"{option} has no line of help"


def test_the_defaults_of_train_are_those_of_its_preset(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tiny", "ffhq1024"):
        shown = said(capsys, "train", name, "--help", status=0)
        assert re.search(rf"--steps INT\W+[^(]*\(default: {PRESETS[name]().steps}\)", shown)
        assert re.search(rf"--model.num-layers INT\W+[^(]*\(default: {PRESETS[name]().model.num_layers}\)", shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "--model", "m", "--stpes", "3"], "unknown option --stpes (the nearest known name is --steps)"),
        (["sample", "--modle", "m"], "unknown option --modle (the nearest known name is --model)"),
        (["sample", "--model", "m", "--num", "3"], "unknown option --num (the nearest known name is --"),
        (["train", "tiny", "--model.num-heds=3"], "--model.num-heds (the nearest known name is --model.num-heads)"),
        (["sample", "--model", "m", "--steps", "3.5"], "argument --steps: '3.5' must be a whole number"),
        (["sample", "--model", "m", "--guidance", "much"], "argument --guidance: 'much' must be a number"),
        (["sample", "--model", "m", "--ray", "1", "--width", "x"], "argument --width: 'x' must be a whole number"),
        (["sample", "--model", "m", "--format", "gif"], "argument --format: 'gif' must be one of png, wds"),
        (["sample", "--model", "m", "--json=false"], "argument --json: it takes no value, and 'false' is one"),
        (["train", "tiny", "--no-flip=1"], "argument --flip: it takes no value, and '1' is one"),
        (["sample", "--model", "--steps", "3"], "argument --model: a value is missing"),
        (["sample", "--config"], "argument --config: a value is missing"),
        (["sample", "--model", "m", "a", "--steps", "3", "b"], "unexpected argument 'b'"),
        (["train", "tiny", "--model.unet.attention", "yes,no"], "'yes,no' must be truth values with commas between"),
        (["export", "--out", "x"], "the following arguments are required: RUN"),
        (["data"], "madformer data: error: a command is missing: there are emoji, clipart, latents"),
        (["data", "latent"], "madformer data: error: unknown command latent (the nearest known name is latents)"),
        (["smaple"], "madformer: error: unknown command smaple (the nearest known name is sample)"),
        (["completion", "sh"], "argument SHELL: 'sh' must be one of bash, zsh, fish"),
    ],
)
def test_words_that_are_not_understood(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in said(capsys, *words)


def test_words_that_are_understood() -> None:
    sample = Sample.parse(["--model", "m", "--lora-strength", "-.5", "--ray", "red apple", "--no-json"], "")
    assert (sample.lora_strength, sample.ray, sample.texts, sample.json) == (-0.5, 0, ("red apple",), False)
    assert Sample.parse(["--model", "m", "--ray", "2", "a"], "").ray == 2
    assert Sample.parse(["--model", "m", "--", "--ray"], "").texts == ("--ray",)
    assert Sample.parse(["--model", "m", "--prompt=--ray", "--prompt", "b"], "").prompt == ("--ray", "b")
    assert Sample.parse(["--model=a=b", "--vae", "None"], "").vae == "None"
    given = ["--no-model.qk-norm", "--model.no-mlp-bias", "--model.block-grid", "2x3", "tiny", "--ema-decays=.9,.5"]
    train = Train.parse(given, "")
    assert train.preset == "tiny"
    assert train.changes == {
        "model": {"qk_norm": False, "mlp_bias": False, "block_grid": (2, 3)},
        "ema_decays": (0.9, 0.5),
    }


def test_a_request_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Sample.parse(["--model", "m"], "").model = "n"  # type: ignore[misc]


def test_completion_knows_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    wanted = {
        "madformer sam": "sample",
        "madformer sample --guid": "--guidance",
        "madformer data lat": "latents",
        "madformer train --model.unet.norm": "--model.unet.norm-groups",
    }
    program = f"source {script}; complete=$(complete -p madformer | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
    for line in wanted:
        words = line.split()
        program += f"""COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE="{line}"; COMP_POINT={len(line)}
            $complete madformer {words[-1]} {words[-2]}; echo "${{COMPREPLY[@]}}"; COMPREPLY=()\n"""
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    for (line, found), said_of_it in zip(wanted.items(), result.stdout.splitlines(), strict=True):
        assert found in said_of_it.split(), (line, result.stdout, result.stderr)
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "guidance" in capsys.readouterr().out
