"""A pipeline's folder: diffusers' own format, loaded by its machinery or by ours with complaints of one line.

``model_index.json`` decides which parts a folder has. A part that an earlier save left behind is removed, never loaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils as loading
from diffusers.pipelines import pipeline_utils
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import ModelCard, ModelCardData, create_repo

from madformer.conditioning.tokenizer import (
    ByteTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    check_tokenizer,
    load_tokenizer,
)
from madformer.engine.schedulers import FLOW_SCHEDULERS, check_name
from madformer.files.atomic import atomic_path, made, write_json
from madformer.files.hub import CONFIG_NAME, resolve_folder
from madformer.files.text import first_line
from madformer.model import MADFormer
from madformer.model.pretrained import publish, staging
from madformer.objects import read_object
from madformer.vae import load_vae

MODEL_INDEX = "model_index.json"
OWN_CODE = "pipeline.py"
PARTS = ("transformer", "vae", "scheduler", "tokenizer")
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token")
_DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
KEEP: Any = object()
"""In place of a part: the one in the folder. None is for none at all."""

# diffusers looks up here how a library's classes are saved and loaded, by the name that stands in a folder's index
_METHODS = ["save_pretrained", "from_pretrained"]
loading.LOADABLE_CLASSES["madformer"] = {
    MADFormer.__name__: ["save_pretrained", "from_pipeline"],
    ByteTokenizer.__name__: _METHODS,
    PretrainedTokenizer.__name__: _METHODS,
}
loading.ALL_IMPORTABLE_CLASSES.update(loading.LOADABLE_CLASSES["madformer"])


class PersistentPipeline(DiffusionPipeline):
    """``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` of the pipeline."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        vae: Any = KEEP,
        tokenizer: str | Path | Tokenizer | None = KEEP,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        vae_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, from a local folder or a repository on the hub.

        Args:
            pretrained_model_name_or_path: folder or hub id, or with ``subfolder`` a part of it; a bare model folder
                (``config.json``) is accepted too.
            vae, tokenizer: in place of those in the folder: an object, its folder or hub id, or None for none.
            dtype, torch_dtype: of the weights; fp32 for None, whatever is stored, as in diffusers. One for all parts,
                or by their names and ``"default"``. vae_dtype: of the autoencoder.
            device: where to put it.
            options: ``transformer``, ``scheduler`` or ``class_names`` to use; ``variant``, ``use_safetensors``,
                ``device_map``, ``local_files_only``, ``cache_dir``, ``token`` and whatever else
                :meth:`diffusers.DiffusionPipeline.from_pretrained` takes.

        Raises:
            FileNotFoundError, ValueError: in one line, what is missing, damaged or does not fit.
        """
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        name = pretrained_model_name_or_path
        folder = resolve_folder(name, revision, **hub) / (subfolder or "")
        dtypes = _dtypes(dtype if dtype is not None else torch_dtype, vae_dtype)
        index = _load_index(folder)
        own = index or {"transformer": ["madformer", MADFormer.__name__]}
        _check_scheduler(folder, own, options)
        if vae is KEEP:
            vae = folder / "vae" if own.get("vae", [None])[0] == "diffusers" and "device_map" not in options else KEEP
        if isinstance(vae, (str, Path)):
            vae = load_vae(vae, device or "cpu", dtypes["vae"], **_form(Path(vae), options))
        if tokenizer is KEEP:
            tokenizer = _own_tokenizer(folder, index, options)
        elif isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        if not index:
            made = _of_bare_model(cls, folder, dtypes["default"], options)
        else:
            # those of other classes than diffusers expects are put in afterwards
            given: dict[str, Any] = {"tokenizer": None, _DTYPE: dtypes} | ({} if vae is KEEP else {"vae": None})
            options.setdefault("low_cpu_mem_usage", is_accelerate_available())
            with _no_bar():
                made = _in_one_line(folder, super().from_pretrained, str(folder), **given, **options)
        made._put_in(None if vae is KEEP and not index else vae, tokenizer)
        return made if device is None else made.to(device)

    def _put_in(self, vae: Any, tokenizer: Any) -> None:
        """Parts that were loaded apart; ``KEEP`` for what is there."""
        config = self.transformer.config
        if tokenizer is not None and config.text is not None:
            check_tokenizer(tokenizer, config.text)
        parts = {"vae": vae, "tokenizer": tokenizer}
        self.register_modules(**{name: part for name, part in parts.items() if part is not KEEP})

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write ``transformer/``, ``vae/``, ``scheduler/``, ``tokenizer/`` and ``model_index.json``.

        Parts that an earlier save left in the folder, and that this pipeline has not, are removed.

        Args:
            dtype: cast the weights. kwargs: for ``push_to_hub``: ``repo_id``, ``token``, ``private``,
                ``commit_message``, ``create_pr``; ``license`` for its model card.

        Raises:
            OSError: the folder cannot be written. ValueError: the model has adapters, which are saved apart.
        """
        folder, before = Path(save_directory), dict[str, Any]()
        with suppress(ValueError):
            before = _load_index(folder)
        form: dict[str, Any] = {"safe_serialization": safe_serialization, "variant": variant}
        if max_shard_size is not None:
            form["max_shard_size"] = max_shard_size
        _plain(self.transformer).save_pretrained(folder / "transformer", dtype=dtype, **form)
        index: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": diffusers.__version__}
        for name in PARTS:
            part = _plain(getattr(self, name))
            index[name] = [None, None] if part is None else list(loading._fetch_class_library_tuple(part))
            if part is None:
                if (before.get(name) or [None])[0] is not None:
                    shutil.rmtree(folder / name, ignore_errors=True)
            elif name == "vae":
                _save_weights(part, folder / name, dtype, form)
            elif name != "transformer":
                _save_whole(part, folder / name)
        if self.config.class_names is not None:
            # an object: diffusers takes a list in an index for a part
            index["class_names"] = {str(number): name for number, name in enumerate(self.config.class_names)}
        with atomic_path(folder / OWN_CODE) as path:
            path.write_text(_CODE, encoding="utf-8")
        write_json(folder / MODEL_INDEX, index)
        if push_to_hub:
            self._push(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to a repository on the hub, with a model card.

        Args:
            kwargs: of :meth:`save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = [name for name in ("safe_serialization", "variant", "max_shard_size", "dtype") if name in kwargs]
            self.save_pretrained(folder, **{name: kwargs.pop(name) for name in names})
            return self._push(Path(folder), repo_id, **kwargs)

    def _push(
        self,
        folder: Path,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        license: str = "other",
        subfolder: str | None = None,
    ) -> Any:
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        if not (folder / "README.md").is_file():
            self.model_card(repo_id, license).save(folder / "README.md")
        options = {"token": token, "commit_message": commit_message, "create_pr": create_pr}
        return self._upload_folder(folder, repo_id, subfolder=subfolder, **options)

    def model_card(self, name: str, license: str = "other") -> ModelCard:
        """What a repository's ``README.md`` says: license, tags, what the model is and how it is loaded."""
        config = self.transformer.config
        told = "prompt=" * (config.text is not None) or "labels=" * bool(config.num_classes)
        task = "text-to-image" if config.text is not None else "unconditional-image-generation"
        data = ModelCardData(
            license=license, library_name="diffusers", pipeline_tag=task, tags=["diffusers", "madformer", task]
        )
        height, width = config.latent_shape[1:]
        parameters = sum(parameter.numel() for parameter in self.transformer.parameters()) / 1e6
        call = f"pipeline({told}...)" if told else "pipeline()"
        body = _CARD.format(
            name=name, parameters=parameters, blocks=config.num_blocks, height=height, width=width, call=call
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")


_CODE = '''"""Lets diffusers find the pipeline: DiffusionPipeline.from_pretrained(..., custom_pipeline="pipeline")."""

from madformer import MADFormerPipeline

__all__ = ["MADFormerPipeline"]
'''
_CARD = """
# {name}

A MADFormer ([arXiv 2506.07999](https://arxiv.org/abs/2506.07999)): autoregression across the {blocks} blocks of a
picture and diffusion within each. {parameters:.1f} million parameters, latents of {height} x {width}.

```python
from madformer import MADFormerPipeline

pipeline = MADFormerPipeline.from_pretrained("{name}")
image = {call}.images[0]
```

With `madformer` installed `DiffusionPipeline.from_pretrained("{name}", custom_pipeline="pipeline",
trust_remote_code=True)` loads it, too.
"""


def names_of_classes(names: Sequence[str] | Mapping[Any, str] | None) -> list[str] | None:
    """By class, as a list; or by number, as a folder's index has them."""
    if isinstance(names, Mapping):
        numbered = {int(number): name for number, name in names.items()}
        return [numbered[number] for number in sorted(numbered)]
    return None if names is None else list(names)


def _dtypes(dtype: Any, vae_dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """By part, fp32 where nothing is said."""
    dtypes = dict(dtype) if isinstance(dtype, Mapping) else {"default": dtype or torch.float32}
    default = dtypes.setdefault("default", torch.float32)
    return {**dtypes, "vae": vae_dtype or dtypes.get("vae", default)}


def _of_bare_model(cls: type[Any], folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """A pipeline around a model's own folder."""
    from madformer.engine.schedulers import default_scheduler

    transformer, scheduler = options.pop("transformer", None), options.pop("scheduler", None)
    names = options.pop("class_names", None)
    if transformer is None:
        transformer = MADFormer.from_pretrained(folder, dtype=dtype, **options)
    return cls(transformer, None, scheduler or default_scheduler(transformer.config.prediction_type), None, names)


def _in_one_line(folder: Path, load: Any, *args: Any, **kwargs: Any) -> Any:
    """What diffusers' own loading gives; what it complains of in its first line."""
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if len(str(error).strip().splitlines()) == 1 and isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(f"{folder} holds no pipeline: {first_line(error)}") from error


@contextmanager
def _no_bar() -> Iterator[None]:
    """Over parts that are loaded in a moment."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def _load_index(folder: Path) -> dict[str, Any]:
    """Empty where there is none."""
    path = folder / MODEL_INDEX
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        for part in PARTS:
            library, name = index.get(part) or (None, None)
            assert (library is None) == (name is None)
        return dict(index)
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} is no index of a pipeline: {error}") from error


def _check_scheduler(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> None:
    """Whether the folder has a scheduler that can be used, where it is to be loaded; raises ``ValueError``."""
    if "scheduler" in options or "scheduler" not in index:
        return
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values["_class_name"]
        if index["scheduler"][0] == "diffusers":
            getattr(diffusers, name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no diffusers scheduler: {error}") from error
    library, own = index["scheduler"]
    if library == "diffusers":
        check_name(name)
        # what the index names is made from this file, whose fields would say nothing to it
        if (own in FLOW_SCHEDULERS) != (name in FLOW_SCHEDULERS):
            raise ValueError(f"{path} is of {name}, and {MODEL_INDEX} names {own}: their noise is another")


def _reads_text(folder: Path, options: dict[str, Any]) -> bool:
    """Whether the model does, without its weights."""
    if options.get("transformer") is not None:
        return options["transformer"].config.text is not None
    for path in (folder / "transformer" / CONFIG_NAME, folder / CONFIG_NAME):
        if path.is_file():
            from madformer.config import MADFormerConfig

            return MADFormerConfig.from_file(path).text is not None
    return False


def _own_tokenizer(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> Tokenizer | None:
    """The one in the folder; bytes need nothing there but their name."""
    name = index["tokenizer"][1] if index.get("tokenizer") else None
    if name is not None and (folder / "tokenizer").is_dir():
        return load_tokenizer(folder / "tokenizer")
    if name == ByteTokenizer.__name__:
        return ByteTokenizer()
    if name is None and (index.get("tokenizer") or not _reads_text(folder, options)):
        return None
    raise ValueError(f"{folder} holds no tokenizer/, and its model reads text: name a tokenizer to use")


def _form(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What of the weights' form the options ask for and a part has: it may have no such variant."""
    form = {name: options[name] for name in ("use_safetensors",) if name in options}
    variant = options.get("variant")
    if variant is not None and folder.is_dir() and any(f".{variant}" in path.name for path in folder.iterdir()):
        form["variant"] = variant
    return form


def _plain(part: Any) -> Any:
    """Without what ``torch.compile`` wraps around a module."""
    return getattr(part, "_orig_mod", part)


def _save_weights(module: Any, folder: Path, dtype: torch.dtype | None, form: dict[str, Any]) -> None:
    """A module of diffusers; every file appears whole, and weights of another class, shape or form are gone."""
    with staging(folder) as staged:
        stored = module
        if dtype is not None:
            stored = type(module).from_config(module.config)
            stored.load_state_dict({key: value.detach().cpu() for key, value in module.state_dict().items()})
            stored.to(dtype)
        stored.save_pretrained(staged, **form)
        publish(staged, folder, form["variant"], _public)


def _save_whole(part: Any, folder: Path) -> None:
    """A part of a few small files, in place of all that was there."""
    with tempfile.TemporaryDirectory(dir=made(folder.parent), prefix=f".{folder.name}.") as name:
        staged = Path(name) / folder.name
        part.save_pretrained(staged)
        if folder.is_dir():
            shutil.rmtree(folder)
        staged.replace(folder)


def _public(path: Path) -> dict[str, Any]:
    """A configuration without what says where it came from."""
    values = read_object(path)
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "_diffusers_version")}
