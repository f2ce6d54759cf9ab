"""What :class:`~madformer.model.MADFormer` is to diffusers: a model with ``save_pretrained`` and ``from_pretrained``.

diffusers reads and writes the files; here is what it leaves open. A file appears whole or not at all, what an earlier
save left behind is not read afterwards, weights have to fit the configuration, and complaints are one line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import is_accelerate_available
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from madformer.config import FOREIGN, REGISTERED, MADFormerConfig
from madformer.files.atomic import atomic_path, file_locks, naming, umask
from madformer.files.hub import CONFIG_NAME, resolve_folder
from madformer.files.weights import load_weights, misfit

STAGING = ".saving."
WEIGHTS_NAME = "diffusion_pytorch_model"
WEIGHTS_FILE = re.compile(
    r"diffusion_pytorch_model(-\d+-of-\d+)?(\.(?P<variant>[^.]+?))?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)(\.index(\.(?P<index_variant>[^.]+))?\.json)?"
)
"""Every name that diffusers gives to weights, their shards and the lists of those."""


class _NoEmptyLists(logging.Filter):
    """diffusers 0.42 warns at every cast that no module is to be kept in fp32."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()


logging.getLogger("diffusers.models.modeling_utils").addFilter(_NoEmptyLists())


class PretrainedMixin(ModelMixin, ConfigMixin):
    """Persistence for a module that is made from a :class:`MADFormerConfig`, as diffusers' models have it."""

    config_name = CONFIG_NAME
    _config: MADFormerConfig

    @property
    def config(self) -> MADFormerConfig:
        return self._config

    @config.setter
    def config(self, config: MADFormerConfig) -> None:
        self._config = config
        # where diffusers looks for names that are asked of the model and are its configuration's
        self._internal_dict = FrozenDict(config.items())

    def register_to_config(self, **values: Any) -> None:
        """Put values into the configuration: fields change it, others are kept beside them."""
        self.config = self.config.register(**values)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A model with new weights.

        Args:
            config: a configuration, its fields, or the folder or hub id of a model.
            return_unused_kwargs: also return the ``kwargs`` that are no fields, and what the configuration has beside
                its fields.
            kwargs: fields to change.

        Raises:
            ValueError: a field that there is not, or an impossible value.
        """
        if config is None:
            raise ValueError("from_config needs a configuration, or the folder of a model")
        if isinstance(config, (str, Path)):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        assert isinstance(config, Mapping)
        parsed = config if isinstance(config, MADFormerConfig) else MADFormerConfig.from_dict(config)
        names = {own.name for own in fields(MADFormerConfig)}
        changes = {name: value for name, value in kwargs.items() if name in names}
        unused = {name: value for name, value in kwargs.items() if name not in changes}
        if unused and not return_unused_kwargs:
            raise ValueError(f"unknown configuration field {', '.join(sorted(unused))}")
        model = cls(parsed.register(**changes))
        return (model, {**unused, **model.config.registered}) if return_unused_kwargs else model

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[torch.nn.Module], ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """diffusers' own, see there; layers that it leaves out get a dtype that holds both their own and the others'.

        PyTorch's normalisations take no activations that are more precise than their weights.
        """
        compute_dtype = compute_dtype or self.dtype
        skipped = skip_modules_pattern, skip_modules_classes
        super().enable_layerwise_casting(storage_dtype, compute_dtype, *skipped, non_blocking)
        for module in self.modules():
            registry = vars(module).get("_diffusers_hook")
            if registry is not None and registry.get_hook("layerwise_casting") is not None:
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and parameter.itemsize > 1:
                    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, compute_dtype))

    def to_json_string(self) -> str:
        """What ``config.json`` holds: not what diffusers notes under names that begin with ``_``."""
        config = self.config
        if self._auto_class is not None:
            module = type(self).__module__.rpartition(".")[2]
            config = config.register(auto_map={self._auto_class: f"{module}.{type(self).__name__}"})
        notes = {name: value for name, value in config.registered.items() if not name.startswith("_")}
        marked = [name for name in notes if name not in FOREIGN]
        mark = {REGISTERED: marked} if marked else {}
        values = {"_class_name": type(self).__name__, **mark, **config.to_dict(), **notes}
        return json.dumps(values, indent=2, default=lambda value: value.to_dict()) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        with atomic_path(Path(json_file_path)) as path:
            path.write_text(self.to_json_string(), encoding="utf-8")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        *,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write ``config.json`` and the weights. Each file appears whole or not at all.

        Weights of the same variant that an earlier save left in the folder are removed, whatever their form; those of
        other variants stay as long as they are of the same configuration.

        Args:
            dtype: cast the weights.
            kwargs: for ``push_to_hub``: ``repo_id``, ``token``, ``private``, ``commit_message``, ``create_pr``.

        The other arguments are those of :meth:`diffusers.ModelMixin.save_pretrained`.

        Raises:
            ValueError: the model has adapters, or other modules than its configuration says.
            OSError: the folder cannot be written.
        """
        stored = self._as_stored(dtype)
        options = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
        folder = Path(save_directory)
        with staging(folder) as staged:
            try:
                super(PretrainedMixin, stored).save_pretrained(str(staged), is_main_process, save_function, **options)
            except SafetensorError as error:  # the disk is full
                raise OSError(f"cannot write to {folder}: {error}") from error
            publish(staged, folder, variant, MADFormerConfig.from_file)
        if push_to_hub:
            kwargs.setdefault("repo_id", folder.name)
            with tempfile.TemporaryDirectory() as temporary:
                options["push_to_hub"] = True
                super(PretrainedMixin, stored).save_pretrained(temporary, is_main_process, None, **options, **kwargs)
                if (card := Path(temporary, "README.md")).is_file():
                    with atomic_path(folder / card.name) as path:
                        shutil.copyfile(card, path)

    def _as_stored(self, dtype: torch.dtype | None) -> Self:
        """This model, cast, as a plain module tree over the same weights."""
        if getattr(self, "hf_quantizer", None) is not None:
            return self
        if adapters := list(getattr(self, "peft_config", ())):
            raise ValueError(
                f"the model has adapters ({', '.join(adapters)}), which are no part of its folder: save_lora_adapter "
                "writes them, and unload_lora takes them off, after fuse_lora leaving their effect in the weights"
            )
        state = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        if dtype is not None:
            state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        with torch.device("meta"):
            stored = type(self)(self.config)
        load_weights(stored, state, origin="the model as it is", assign=True)
        return stored

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load what :meth:`save_pretrained` wrote, from a local folder or a repository on the hub, in eval mode.

        Args:
            pretrained_model_name_or_path: folder or hub id; ``subfolder`` names a part of it.
            dtype: cast the weights; None keeps the stored dtype. ``torch_dtype`` is its other name.
            device: move the model there.
            kwargs: ``variant``, ``use_safetensors``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
                ``device_map`` and whatever else :meth:`diffusers.ModelMixin.from_pretrained` takes; and configuration
                fields to change.

        Raises:
            FileNotFoundError: nothing there. ValueError: a file that is damaged, or weights that do not fit.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if Path(name).is_dir():
            name, subfolder = str(Path(name, subfolder or "")), None
            _check_folder(Path(name), kwargs)
        elif Path(name).exists():
            raise NotADirectoryError(f"{name} is a file; a model is a folder that holds {CONFIG_NAME}")
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        dtype = dtype if dtype is not None else torch_dtype
        try:
            loaded = super().from_pretrained(
                name, subfolder=subfolder, torch_dtype=dtype, output_loading_info=True, **kwargs
            )
        except (OSError, HFValidationError) as error:
            raise _in_one_line(error, name) from error
        model, info = loaded
        if device is not None:
            model.to(device)
        return (model, info) if output_loading_info else model  # type: ignore[return-value]

    @classmethod
    def from_pipeline(
        cls, folder: str | os.PathLike[str], *, torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Self:
        """As :meth:`from_pretrained`, in fp32 unless told otherwise: diffusers' rule for the parts of a pipeline."""
        return cls.from_pretrained(folder, torch_dtype=torch_dtype or torch.float32, **kwargs)

    @classmethod
    def _load_pretrained_model(  # where diffusers has found the files and made the module, and not yet filled it
        cls,
        model: Any,
        state_dict: Mapping[str, Tensor] | None,
        resolved_model_file: list[str],
        pretrained_model_name_or_path: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("hf_quantizer") is None and not kwargs.get("ignore_mismatched_sizes"):
            stored = _headers(state_dict, resolved_model_file)
            if why := misfit(model, {name: shape for name, (shape, _) in stored.items()}):
                origin = resolved_model_file[0] if len(resolved_model_file) == 1 else pretrained_model_name_or_path
                raise ValueError(f"{origin} does not fit the configuration: {why}")
            if kwargs.get("dtype") is None:
                # diffusers casts to what the module has
                for name, parameter in model.named_parameters():
                    if (own := stored[name][1]).itemsize > 1:  # nobody computes in float8
                        parameter.data = parameter.data.to(own)
        return super()._load_pretrained_model(
            model, state_dict, resolved_model_file, pretrained_model_name_or_path, *args, **kwargs
        )


def config_of(name: str | Path) -> MADFormerConfig:
    """The configuration of a stored model, or of a stored pipeline's, without its weights.

    Raises:
        FileNotFoundError: there is no folder or repository of that name, or no model in it. ValueError: it is a run's.
    """
    folder = resolve_folder(name)
    path = next((p for p in (folder / "transformer" / CONFIG_NAME, folder / CONFIG_NAME) if p.is_file()), None)
    if path == folder / CONFIG_NAME and (folder / "environment.json").is_file():
        raise ValueError(f"{folder} is the folder of a run; its model is {folder / 'model'}")
    if path is None:
        raise FileNotFoundError(f"{folder} holds no model: no {CONFIG_NAME} in it or in its transformer/")
    return MADFormerConfig.from_file(path)


def _headers(state: Mapping[str, Tensor] | None, files: list[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor."""
    headers = {} if state is None else {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    for file in files if state is None else ():
        try:
            if str(file).endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        tensor = tensors.get_tensor(name)
                        headers[name] = (tuple(tensor.shape), tensor.dtype)
            else:
                headers |= _headers(torch.load(file, map_location="meta", weights_only=True), [])
        except Exception as error:
            raise _damaged(file) from error
    return headers


def _damaged(file: str | Path) -> ValueError:
    return ValueError(f"{file} is damaged or truncated")


def _check_folder(folder: Path, options: dict[str, Any]) -> None:
    """Raises an error of one line for a folder that holds no model; says what form the weights are in."""
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG_NAME}; a model folder is what save_pretrained writes")
    MADFormerConfig.from_file(folder / CONFIG_NAME)
    if options.get("use_flashpack"):
        return
    variant, safe = options.get("variant"), options.get("use_safetensors")
    forms = [form for form, given in (("safetensors", True), ("bin", False)) if safe is None or safe == given]
    weights = {path: _variant_of(path) for path in sorted(folder.iterdir()) if WEIGHTS_FILE.fullmatch(path.name)}
    own = [path for path, name in weights.items() if name == variant and any(f".{form}" in path.name for form in forms)]
    if not own:
        names = [".".join(filter(None, (WEIGHTS_NAME, variant, form))) for form in forms]
        there = ", ".join(path.name for path in weights) or "no weights"
        # the end is diffusers' own message
        raise FileNotFoundError(
            f"{folder} holds no {' or '.join(names)}, but {there}. "
            f"Error no file named {names[-1]} found in directory {folder}."
        )
    options["use_safetensors"] = any(".safetensors" in path.name for path in own)
    for path in own:
        if path.suffix == ".json":
            try:
                assert isinstance(json.loads(path.read_text(encoding="utf-8"))["weight_map"], dict)
            except (ValueError, LookupError, TypeError, AssertionError) as error:
                raise _damaged(path) from error


def _variant_of(path: Path) -> str | None:
    match = WEIGHTS_FILE.fullmatch(path.name)
    return None if match is None else match["variant"] or match["index_variant"]


def _in_one_line(error: Exception, name: str) -> Exception:
    text = " ".join(str(error).split())
    if damaged := re.search(r"Unable to load weights from checkpoint file for '([^']*)'", text):
        return _damaged(damaged[1])
    if Path(name).is_dir():
        return OSError(text)
    return FileNotFoundError(f"no folder {name}, and no such repository on the hub could be read: {text}")


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder inside ``folder`` that is gone when the block ends; those of saves that were killed go, too."""
    with naming(f"to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{STAGING}*"):
            with _lock(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        name = tempfile.mkdtemp(dir=folder, prefix=STAGING)
    try:
        with _lock(Path(name)):
            yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether no other process holds the folder; this one does in the block, if so."""
    fcntl = file_locks()
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def publish(staged: Path, folder: Path, variant: str | None, read: Callable[[Path], Any]) -> None:
    """Move the files of a save to their folder, and remove the weights of earlier saves that they replace.

    Args:
        read: gives what is to be compared of a configuration's file; raises ``ValueError`` for a damaged one.
    """
    new = sorted(staged.iterdir(), key=lambda path: (path.suffix == ".json", path.name == CONFIG_NAME))
    names, changed = {path.name for path in new}, CONFIG_NAME in {path.name for path in new}
    if changed and (folder / CONFIG_NAME).is_file():
        with suppress(ValueError):
            changed = read(folder / CONFIG_NAME) != read(staged / CONFIG_NAME)
        if changed:
            # rather a folder without a configuration, where this process is killed, than one with the wrong one
            (folder / CONFIG_NAME).unlink()
    for path in new:
        path.chmod(0o666 & ~umask())
        path.replace(folder / path.name)
    for path in folder.iterdir():
        replaced = WEIGHTS_FILE.fullmatch(path.name) and path.name not in names
        if replaced and CONFIG_NAME in names and (changed or _variant_of(path) == variant):
            path.unlink(missing_ok=True)
