"""``madformer info``: what runs here and why, what a model folder holds, and how a picture was drawn."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from madformer.cli.request import Request
from madformer.engine.schedulers import SHORT_NAMES, USABLE

_LISTS = {"prompt": "--prompt", "class": "--class"}
_VALUES = {
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative-prompt",
    "steps": "--steps",
    "refresh_every": "--refresh-every",
    "diffusion_layers": "--diffusion-layers",
    "height": "--height",
    "width": "--width",
    "vae_tile": "--vae-tile",
    "precision": "--precision",
}
PACKAGES = ("torch", "triton", "diffusers", "flash-attn", "flash-attn-4", "xformers")


@dataclass(frozen=True, kw_only=True)
class Info(Request):
    """Show versions, devices and backends with the reason for each; with --model, a model too. Of a picture, latents, a
    shard or a folder that madformer sample wrote, show how it was drawn.

    examples:
      madformer info samples/00000007.png
      madformer info images-000000.tar/00000007.png
    """

    # file or folder that madformer sample wrote, or a model's folder
    path: Annotated[Path | None, Positional, arg(metavar="PICTURE")] = None
    model: str | None = None  # show the configuration and the size of this model too, a folder or hub id
    json: bool = False  # print one JSON object, for programs and bug reports

    def run(self) -> None:
        from madformer.bulk.folder import MANIFEST

        model = self.model
        if self.path and model:
            raise ValueError("a picture and --model are two questions: ask one")
        if self.path and self.path.is_dir() and not (self.path / MANIFEST).exists():
            model = str(self.path)
        elif self.path:
            described = describe(self.path)
            print(json.dumps(described) if self.json else "\n".join(lines(described)))
            return
        record = _machine()
        if model:
            record["model"] = _model(model)
        if self.json:
            print(json.dumps(record))
            return
        for name, version in record["versions"].items():
            print(f"{name:<12} {version or 'not installed'}")
        for device in record["devices"]:
            print(f"{'device':<12} {device}")
        print()
        for backend in record["backends"]:
            state = "yes" if backend["available"] else "no"
            print(f"{backend['backend']:<12} {state:<4} {backend['reason']}: {', '.join(backend['ops'])}")
        for name, value in record.get("model", {}).items():
            print(f"{name:<24} {value}")


def _machine() -> dict[str, Any]:
    import dataclasses

    import torch

    import madformer
    from madformer.kernels import dispatch
    from madformer.machine import default_dtype

    versions = {"madformer": madformer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    versions["torch"] = torch.__version__  # which names the build, as in +cu130
    devices = [f"cpu, {torch.get_num_threads()} threads, samples in {default_dtype('cpu')}"]
    devices += [
        f"cuda:{index}, {torch.cuda.get_device_name(index)}, samples in {default_dtype('cuda')}"
        for index in range(torch.cuda.device_count())
    ]
    return {
        "versions": versions,
        "devices": devices,
        "backends": [dataclasses.asdict(status) for status in dispatch.report()],
    }


def _model(name: str) -> dict[str, Any]:
    import torch

    from madformer.model import MADFormer
    from madformer.model.pretrained import config_of

    config = config_of(name)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MADFormer(config).parameters())
    return {"parameters": parameters, **config.to_dict()}


# Of what `madformer sample` wrote


def describe(path: Path) -> dict[str, Any]:
    """A picture's record, with the command that draws it again; a run's manifest; what a shard holds.

    Raises:
        OSError, ValueError: in one line, what is wrong with the file.
    """
    from madformer.bulk.folder import MANIFEST, read_manifest
    from madformer.bulk.records import read_record
    from madformer.files.resumable import flat
    from madformer.files.shards import ShardDataset

    if path.is_dir():
        manifest = read_manifest(path / MANIFEST)
        settings = manifest.pop("settings")
        return {"run": {**manifest, **flat(settings)}}
    if path.suffix == ".tar" and path.is_file():
        shard = ShardDataset(path)
        kinds = [extension for extension in shard.extensions if extension != "json"]
        first = f"{path / shard.key(0)}.{kinds[0]}" if kinds else None
        return {"shard": {"samples": len(shard), "holds": shard.extensions, "first": first}}
    record = read_record(path)
    return {"picture": record, "command": command(record)}


def command(record: Mapping[str, Any]) -> str | None:
    """What draws it again, given the model; None where a shell could not be told, or the record is not understood."""
    try:
        words = ["madformer", "sample", "--model", "MODEL", f"--seed={int(record['seed'])}"]
        if "num_images" in record:
            words.append(f"--num-images={int(record['num_images'])}")
        lists = dict(_LISTS) if record.get("class") else {**_LISTS, "labels": "--class"}
        for name, option in lists.items():
            values = record.get(name, [])
            words += [f"{option}={value}" for value in (values if isinstance(values, list) else [values])]
        words += [f"{option}={record[name]}" for name, option in _VALUES.items() if name in record]
        if "guidance_interval" in record:
            words.append("--guidance-interval={},{}".format(*record["guidance_interval"]))
        if "lora" in record:
            words += [f"--lora={record['lora']['name']}", f"--lora-strength={float(record['lora']['strength'])}"]
        if (scheduler := record["scheduler"]) in USABLE:
            words.append(f"--scheduler={next((n for n, kind in SHORT_NAMES.items() if kind == scheduler), scheduler)}")
        words += ["--grid=picture.png"] if "height" in record else ["--latents", "--out=folder"]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    if not all(word.isprintable() for word in words):
        return None
    return " ".join(words[:4] + [_quoted(word) for word in words[4:]])


def lines(described: Mapping[str, Any]) -> list[str]:
    """For a terminal: what could be more than text for it is escaped."""
    found = []
    for values in (described.get(name, {}) for name in ("picture", "run", "shard")):
        found += [f"{name:<20} {_shown(value)}" for name, value in values.items()]
    if described.get("command"):
        found += ["", "drawn again by:", described["command"]]
    return found


def _quoted(word: str) -> str:
    option, equals, value = word.partition("=")
    if not equals:
        return word
    return f"{option} {shlex.quote(value)}" if not value.startswith("-") else f"{option}={shlex.quote(value)}"


def _shown(value: Any) -> str:
    text = ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)
    return text if text.isprintable() else repr(text)
