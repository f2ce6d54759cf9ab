"""``madformer info``: what runs here and why, what a model folder holds, and how a picture was drawn."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from madformer.cli import recorded

PACKAGES = ("torch", "triton", "diffusers", "flash-attn", "flash-attn-4", "xformers")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="show what runs here, what a model is, or how a picture was drawn",
        description="Show versions, devices and backends with the reason for each; with --model, a model too. "
        "Of a picture, latents, a shard or a folder that madformer sample wrote, show how it was drawn.",
        epilog="examples:\n  madformer info samples/00000007.png\n  madformer info images-000000.tar/00000007.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "path", nargs="?", type=Path, metavar="PICTURE", help="file or folder of madformer sample, or a model"
    )
    parser.add_argument("--model", help="a model folder or hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from madformer.bulk.folder import MANIFEST

    if args.path and args.model:
        raise ValueError("a picture and --model are two questions: ask one")
    if args.path and args.path.is_dir() and not (args.path / MANIFEST).exists():
        args.model = str(args.path)
    elif args.path:
        described = recorded.describe(args.path)
        print(json.dumps(described) if args.json else "\n".join(recorded.lines(described)))
        return
    record = _machine()
    if args.model:
        record["model"] = _model(args.model)
    if args.json:
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
