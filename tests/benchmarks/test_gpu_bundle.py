"""What is carried to a GPU machine is taken where it fits, and refused in one line where it does not."""

from __future__ import annotations

import json
import sysconfig
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a wheel that is missing here, one that is not, a damaged one, and an extension of this very kind."""
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    for name in ("not_here", "torch"):
        with zipfile.ZipFile(folder / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
    (folder / "wheels" / "cut-1.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
    extension = "_C.abi3.so"
    (folder / extension).write_bytes(b"an extension")
    (folder / "manifest.json").write_text(json.dumps({"extension": extension, "kind": gpu_bundle.kind()}))
    monkeypatch.setattr(gpu_bundle, "loads", lambda library: "")
    return folder


def test_what_is_missing_is_unpacked(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site, package = tmp_path / "site", tmp_path / "package"
    assert gpu_bundle.use(bundle, package, site) == ""
    assert sorted(path.name for path in site.iterdir()) == ["not_here", "not_here-1.0.dist-info"]
    assert [path.read_bytes() for path in package.iterdir()] == [b"an extension"]
    assert "cut-1.0-py3-none-any.whl is left out" in capsys.readouterr().err
    assert gpu_bundle.use(bundle, package, site) == ""
    assert "unpacked" not in capsys.readouterr().out


def test_a_link_is_replaced_and_not_written_through(bundle: Path, tmp_path: Path) -> None:
    package, own = tmp_path / "package", tmp_path / "own.so"
    package.mkdir()
    own.write_bytes(b"of another install")
    name = json.loads((bundle / "manifest.json").read_text())["extension"]
    (package / name).symlink_to(own)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"found before the other")
    assert gpu_bundle.use(bundle, package, tmp_path / "site") == ""
    assert [path.name for path in package.iterdir()] == [name]
    assert own.read_bytes() == b"of another install"


@pytest.mark.parametrize("part", ["python", "torch", "sources"])
def test_an_extension_of_another_kind_is_compiled_here(part: str, bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["kind"][part] = "another"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    why = gpu_bundle.use(bundle, tmp_path / "package", tmp_path / "site")
    assert why.startswith(f"the bundle's is of other {part}: another")
    assert not (tmp_path / "package").exists()


def test_no_bundle_is_said(tmp_path: Path) -> None:
    assert gpu_bundle.use(tmp_path / "none").startswith("there is no bundle in")


def test_what_does_not_load_is_removed(tmp_path: Path) -> None:
    library = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"no library")
    assert gpu_bundle.loads(library).startswith("the bundle's does not load: ImportError")
    assert not library.exists()


def test_sources_are_copied_without_the_rest(tmp_path: Path) -> None:
    for name in ("train.py", "model/a.py", "config.json", "picture.png", ".git/config.json", "weights.pt"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_text("")
    gpu_bundle.copy_sources(tmp_path / "clone", tmp_path / "out")
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert found == ["config.json", "model/a.py", "train.py"]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        gpu_bundle.copy_sources(tmp_path / "nowhere", tmp_path / "other")
