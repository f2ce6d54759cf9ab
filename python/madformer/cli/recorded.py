"""What ``madformer info`` says of a picture, latents, or a folder that ``madformer sample`` wrote."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
