"""Damages tar shards, their indexes and their members, for :mod:`fuzzing`."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from madformer.data.images import UnreadableImageError, open_dataset
from madformer.data.latents import LatentDataset, LatentDescription
from tests.helpers.fuzz_seeds import sound_files

SHAPE = (4, 2, 2)


def _tar(members: dict[str, bytes], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue().rstrip(b"\0") + bytes(1024)


def _image_members(long: bool) -> dict[str, bytes]:
    picture, members = sound_files()["PNG"][3], {}
    for number in range(3):
        key = f"{'d' * 120}/{number}" if long else f"{number}"
        members[f"{key}.png"] = picture
        members[f"{key}.txt"] = "a caption \u00e9".encode()
        members[f"{key}.cls"] = b"%d" % number
        members[f"{key}.json"] = json.dumps({"caption": ["x", "y"], "label": number}).encode()
    return members


def _latent_members() -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(3):
        record = {"key": f"{number}", "label": number, "caption": "x"}
        members[f"{number:08d}.json"] = json.dumps(record).encode()
        buffer = io.BytesIO()
        np.save(buffer, np.ones((2, *SHAPE), np.float16))
        members[f"{number:08d}.npy"] = buffer.getvalue()
    return members


@cache
def sound_shards() -> dict[str, list[tuple[dict[str, bytes], int]]]:
    """Members and form of the tar."""
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    images = [(_image_members(long), form) for form in forms for long in (False, True) if not long or form != forms[0]]
    return {"shards": images, "latents": [(_latent_members(), form) for form in forms]}


Damage = Callable[[bytes, random.Random], bytes]


def make_shard(number: int, damages: tuple[Damage, ...]) -> tuple[str, bytes, bytes | None]:
    """Kind, a tar of which a header or a member is damaged, and the damaged index that lies beside it, if any."""
    chance = random.Random(number)
    kind = ("shards", "latents")[number % 2]
    members, form = chance.choice(sound_shards()[kind])
    damage, members = chance.choice(damages), dict(members)
    if chance.random() < 0.5:
        name = chance.choice(list(members))
        odd = (
            b"[" * 5000,
            b"[1]",
            b"null",
            b'{"label": [1]}',
            b'{"label": 1e999}',
            b"\xff\xfe",
            b"9" * 5000,
            b"PK\3\4",
        )
        members[name] = chance.choice(odd) if chance.random() < 0.3 else damage(members[name], chance)
        return kind, _tar(members, form), None
    data = _tar(members, form)
    if chance.random() < 0.3:
        return kind, data, _index(data, chance, damage)
    at = chance.randrange(len(data) // 512) * 512
    header = (damage(data[at : at + 512], chance) + bytes(512))[:512]
    if chance.random() < 0.7:
        header = _with_checksum(header)
    return kind, data[:at] + header + data[at + 512 :] if chance.random() < 0.7 else damage(data, chance), None


def _with_checksum(header: bytes) -> bytes:
    total = sum(header[:148]) + 8 * 0x20 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def _index(data: bytes, chance: random.Random, damage: Damage) -> bytes:
    place = chance.choice((0, -1, 512, 1 << 40, 1 << 70, "0", None, 1.5))
    samples = [["0", {"png": [place, chance.choice((10, -1, 1 << 40, True))]}], ["1", {"json": [512, 3]}]]
    index = json.dumps({"bytes": len(data), "samples": samples}).encode()
    return chance.choice((index, index, damage(index, chance)))


def check_shard(kind: str, data: bytes, index: bytes | None) -> str:
    """What became of a shard. Raises ``AssertionError`` where a reader escaped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "latents-000000.tar"
        path.write_bytes(data)
        if index is not None:
            path.with_suffix(".index.json").write_bytes(index)
        try:
            return _read_latents(Path(folder)) if kind == "latents" else _read(lambda: open_dataset(Path(folder), 8))
        except AssertionError:
            raise
        except BaseException as error:
            raise AssertionError(f"escaped: {type(error).__name__}: {error}") from error


def _read_latents(folder: Path) -> str:
    description = LatentDescription(
        source="x", num_images=3, class_names=(), image_size=16, latent_shape=SHAPE, dtype="float16", flips=False,
        vae="x", vae_fingerprint="x", shard_size=3,
    )  # fmt: skip
    description.write(folder)
    return _read(lambda: LatentDataset(folder), ValueError)


def _read(opened: Callable[[], Any], damaged: type[Exception] = UnreadableImageError) -> str:
    """What comes of opening a data set and reading its first samples; ``damaged`` is what a bad sample may raise."""
    try:
        dataset = opened()
    except (ValueError, OSError) as error:
        return _refused(error)
    dataset.summary()
    outcome = "read"
    for number in range(min(len(dataset), 20)):
        try:
            dataset[number]
        except damaged as error:
            outcome = _refused(error)
    return outcome


def _refused(error: Exception) -> str:
    if len(str(error).splitlines()) != 1:
        raise AssertionError(f"not one line: {error!r}") from error
    return f"refused: {type(error.__cause__).__name__}"
