"""``madformer info``: what runs here and why, what a model folder holds, and how a picture was drawn."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from madformer.cli import recorded
from madformer.cli.request import Request

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
            described = recorded.describe(self.path)
            print(json.dumps(described) if self.json else "\n".join(recorded.lines(described)))
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

    from madformer.config import MADFormerConfig
    from madformer.files.hub import CONFIG_NAME, resolve_folder
    from madformer.model import MADFormer

    folder = resolve_folder(name)
    path = next((p for p in (folder / "transformer" / CONFIG_NAME, folder / CONFIG_NAME) if p.is_file()), None)
    if path == folder / CONFIG_NAME and (folder / "environment.json").is_file():
        raise ValueError(f"{folder} is the folder of a run; its model is {folder / 'model'}")
    if path is None:
        raise FileNotFoundError(f"{folder} holds no model: no {CONFIG_NAME} in it or in its transformer/")
    config = MADFormerConfig.from_file(path)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MADFormer(config).parameters())
    return {"parameters": parameters, **config.to_dict()}
