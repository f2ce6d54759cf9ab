"""A denoising step's network as one compiled program, on processors: called once a step, without Python in it.

At small batches a step is hundreds of operators of a few microseconds each, and most of its time is what calls them.
Here the step (:class:`Step`) is exported once, compiled by Inductor ahead of time (AOTInductor) to one C++ library,
and kept in ``$XDG_CACHE_HOME/madformer/steps`` under a hash of everything that it was made of but the values of the
weights: those it is given at every call, packed for oneDNN where Python's step has them packed (:mod:`.packing`). It
runs without Python's lock, so that threads that share a batch (:mod:`.sharing`) do not wait for each other.

What is compiled is the model as it is built, of plain parts alone (:func:`.structure.signature`). A model that may
change without being seen, one that reads what its own last step wrote to the cache, and a machine without a C++
compiler go on without, which one line of the log says.

Shape legend: B samples, N rows of the cache (B, or 2 B under guidance), L latents of a block, C channels, S tokens of a
block, T tokens of a row of the cache, H heads, D head dim, E time embedding.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import inspect
import logging
import platform
import tempfile
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from madformer.engine.packing import PackedConv2d, PackedLinear
from madformer.engine.passes import Passes
from madformer.engine.program import Program
from madformer.engine.structure import Placed, Signature, UnknownPartError, signature
from madformer.kernels import dispatch
from madformer.machine import cache_folder, device_name
from madformer.model import MADFormer
from madformer.model.layer import Attention, Projections, set_backend

if TYPE_CHECKING:
    from madformer.engine.pool import ModelKind
    from madformer.engine.sampler import Sampler

logger = logging.getLogger("madformer.engine")

LEAST_LENGTH = 2
"""Of a cache whose length changes: a compiler takes 0 and 1 for constants."""


class _Traced(Passes):
    """The passes of a step whose state is what it is given; the cache is read, and never written to."""

    def __init__(self, model: MADFormer, branches: int, dtype: torch.dtype) -> None:
        self.model, self.config, self.branches, self.dtype = model, model.config, branches, dtype

    def attention(self, view: Any, index: int, stream: str) -> Attention:
        cached, seen_N1ST = view
        keys_NHTD, values_NHTD = cached[index - self.config.ar_layers]

        def attend(projections: Projections) -> Tensor:
            q, k, v = projections.heads()
            if self.config.cross_block_attention:
                keys, values, mask = keys_NHTD, values_NHTD, seen_N1ST
            else:
                length = self.config.text_length
                keys, values, mask = keys_NHTD[:, :, :length], values_NHTD[:, :, :length], None
            joined = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
            return F.scaled_dot_product_attention(q, *joined, attn_mask=mask)

        return attend


class Step(nn.Module):
    """A step's network as a function of tensors, for export. Weights are some of them: a program holds none.

    Args:
        model: a tree of its own, whose kernels are the reference: those Inductor can see into.
        branches: 2 under guidance. dtype: to compute in.
    """

    def __init__(self, model: MADFormer, branches: int, dtype: torch.dtype) -> None:
        super().__init__()
        # not as a part of this one, or its weights would be constants of the program
        self._network = (_Network(model, branches, dtype),)

    def forward(self, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
        """:meth:`_Network.forward` of ``inputs``, with these weights: :func:`weights_of`."""
        # all names are given, and one program is right whether or not some of them are the same tensor
        return torch.func.functional_call(self._network[0], weights, inputs, tie_weights=False)


def weights_of(model: MADFormer) -> dict[str, Tensor]:
    """Tensors of a model by their names in a :class:`Step`, in their order, but for those of autoregressive layers."""
    named = (model.named_parameters, model.named_buffers)
    tensors = {f"model.{name}": tensor for each in named for name, tensor in each(remove_duplicate=False)}
    others = tuple(f"model.layers.{index}." for index in range(model.config.ar_layers))
    return {name: tensor for name, tensor in sorted(tensors.items()) if not name.startswith(others)}


class _Network(nn.Module):
    def __init__(self, model: MADFormer, branches: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.branches, self.dtype = model, branches, dtype

    def forward(
        self,
        latents_BLC: Tensor,
        down_BE: Tensor,
        up_BE: Tensor,
        time_BC: Tensor,
        class_NC: Tensor,
        condition_NSC: Tensor,
        cos_NSD: Tensor,
        sin_NSD: Tensor,
        lengths_N: Tensor,
        cached: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """The prediction ``(N, L, C)``, of the first ``lengths_N`` tokens of each row of ``cached`` and the block."""
        traced, config = _Traced(self.model, self.branches, self.dtype), self.model.config
        tokens_BSC, skips = self.model.embed(latents_BLC[:, None].to(self.dtype), down_BE)
        tokens_NSC = traced._for_branches(tokens_BSC)
        if config.has_condition:
            tokens_NSC = condition_NSC + tokens_NSC
        modulation_NC = None
        if config.modulated:
            time_NC = traced._for_branches(time_BC)
            modulation_NC = F.silu(time_NC + class_NC if config.num_classes else time_NC)
        # as much of the cache as the longest row has, and a mask: one program for every block
        num_cached, size = cached[0][0].shape[2], config.block_size
        place_T = torch.arange(num_cached + size, device=lengths_N.device)
        seen_NT = (place_T < lengths_N[:, None]) | (place_T >= num_cached)
        mask_NT = torch.zeros(seen_NT.shape, dtype=self.dtype).masked_fill(~seen_NT, -torch.inf)
        view = cached, mask_NT[:, None, None].expand(-1, 1, size, -1)
        streams = {"noise": tokens_NSC}
        for index in range(config.ar_layers, config.num_layers):
            attention = traced.attention(view, index, "noise")
            tables = {"noise": (cos_NSD, sin_NSD)}
            streams = self.model.layers[index](streams, self.model.rope, tables, attention, ["noise"], modulation_NC)
        skips = tuple(traced._for_branches(skip) for skip in skips)
        up_NE = traced._for_branches(up_BE)
        return self.model.decode(streams["noise"], up_NE, skips, modulation_NC)[:, 0]


class CompiledPasses(Passes):
    """The passes of all rows, whose step's network is one program, looked for whenever the model is looked at."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.program: Program | None = None
        self._key = ""
        # as what the model was seen, and its weights, which the program reads
        self._seen: object = None
        self._weights: dict[str, Tensor] = {}
        # packed layers that a step does not call
        self._not_called: frozenset[str] = frozenset()

    def rest(self) -> None:
        super().rest()
        self._seen, self._weights = None, {}

    def look_at(self, model: MADFormer, built: Signature | str, threads: int, *, try_out: bool) -> None:
        """Compute with the program of a model, if there is one; it is the one that :meth:`follow` was given.

        Args:
            built: as :func:`seen` says. threads: of PyTorch's, that a pass has. try_out: make a program that there is
                not, in minutes.
        """
        # at every look: a signature tells where tensors lie, and a tensor may since have been given other memory
        self._weights = weights_of(model)
        layers = self._packed_layers()
        seen_as = built, threads, frozenset(layers)
        if self._seen == seen_as:
            self._give_packed(layers)
            return
        why = built if isinstance(built, str) else _refusal(self, model)
        longest = self._longest()
        # packed weights have no strides, and a program must never be made to copy one as if it had
        self._weights |= {f"model.{name}.weight": layer.weight.contiguous() for name, layer in layers.items()}
        columns = self.slots.latents_RLC, *self.slots.schedule(None)[:3]
        inputs = self._inputs(*columns, length=longest and longest // 2)
        key = why or key_of((built, sorted(layers)), tree_leaves(inputs), self.branches, self.dtype, threads)
        if key != self._key:
            self._key, self.program = "", None
            path = folder() / f"{key}.pt2"
            if why is None and not path.exists() and try_out:
                step = Step(_twin(model, layers), self.branches, self.dtype)
                why = _compile(step, inputs, path, threads, longest)
            if why is None and path.exists():
                self.program, why = _loaded(path)
            if why is not None or self.program is not None:
                self._key = key  # else there may be a program by the next time
            if why is not None:
                logger.warning("a denoising step is not compiled: %s", why)
        if self.program is None:
            self._seen, self._weights = None, {}
        else:
            self._seen = seen_as
            self._give_packed(layers)

    def _packed_layers(self) -> dict[str, PackedConv2d | PackedLinear]:
        """Those of the passes' own model that a program may be given the weights of, by their names in it."""
        return {
            name: module
            for name, module in self.model.named_modules(remove_duplicate=False)
            if isinstance(module, (PackedConv2d, PackedLinear)) and f"model.{name}.weight" in self._weights
        }

    def _give_packed(self, layers: Mapping[str, PackedConv2d | PackedLinear]) -> None:
        """Put the packed weights, as they are now, in the place of others."""
        if new := {name for name, layer in layers.items() if layer.met is None} - self._not_called:
            # a step by Python shows each what it is to be packed for; it leaves nothing behind that a step does not
            super().predict(None, self.slots.latents_RLC, *self.slots.schedule(None)[:3])
            self._not_called |= {name for name in new if layers[name].met is None}
        for name, layer in layers.items():
            packed = layer.packed_weight()
            self._weights[f"model.{name}.weight"] = layer.weight.contiguous() if packed is None else packed

    def first_block(self, rows_B: Tensor | None) -> None:
        # a program reads what an earlier run left behind the prefix, under a mask
        self.cache.clear(self._cache_rows(rows_B), self.config.ar_layers)
        super().first_block(rows_B)

    def predict(
        self,
        rows_B: Tensor | None,
        latents_BLC: Tensor,
        down_BE: Tensor,
        up_BE: Tensor,
        time_BC: Tensor,
        *,
        refresh: bool = True,
    ) -> tuple[Tensor, ...]:
        if self.program is None:
            return super().predict(rows_B, latents_BLC, down_BE, up_BE, time_BC, refresh=refresh)
        assert rows_B is None
        output_NLC = self.program(*self._inputs(latents_BLC, down_BE, up_BE, time_BC))
        if output_NLC.dtype == torch.float64:
            output_NLC = output_NLC.float()  # the latents are fp32
        return output_NLC.chunk(self.branches)

    def _longest(self) -> int | None:
        """Of the part of the cache that a program is given, where that is as much as there is; else it is given all."""
        # never all of it: a step's own block lies behind, and a compiler would ask whether this is the whole
        longest = self.cache.keys_RHSD[-1].shape[2] - 1
        return longest if self.config.cross_block_attention and longest >= 2 * LEAST_LENGTH else None

    def _inputs(self, latents_BLC: Tensor, *time: Tensor, length: int | None = None) -> tuple[Any, ...]:
        """What a program is called with; the first ``length`` tokens of the cache, or as many as there are."""
        cache, ar_layers = self.cache, self.config.ar_layers
        cached = list(zip(cache.keys_RHSD[ar_layers:], cache.values_RHSD[ar_layers:], strict=True))
        if longest := self._longest():
            length = length or max(LEAST_LENGTH, int(cache.lengths_R.max()))
            assert length <= longest
            cached = [(keys[:, :, :length], values[:, :, :length]) for keys, values in cached]
        parts = self.slots.class_NC, cache.condition_RLC, self.cos_RSD, self.sin_RSD, cache.lengths_R
        return self._weights, latents_BLC.contiguous(), *(column.contiguous() for column in time), *parts, cached


def may_compile(sampler: Sampler, kind: ModelKind) -> bool:
    """Whether a sampler's steps are to be compiled: of a processor, and the paper's."""
    captures = sampler.launcher is not None and sampler.launcher.captures
    other = captures or sampler.compile_unet or sampler.passes is not Passes
    return sampler.compile_step and kind.device.type == "cpu" and not other


def seen(model: MADFormer) -> Signature | str:
    """How a model is built and where its tensors are, or why that cannot be seen."""
    try:
        return signature(model)
    except UnknownPartError as unknown:
        return str(unknown)


def _refusal(passes: Passes, model: MADFormer) -> str | None:
    """Why there can be no program, in one line."""
    config = passes.config
    if passes.refresh_every > 1:
        return "refresh_every keeps what the diffusion layers added"
    if not config.has_clean_stream and config.cross_block_attention:
        return f"context={config.context!r} reads the keys and values of its own last step"
    if backend := {model.backend, model.attention_backend} - {"auto", "reference"}:
        return f"backend={min(backend)!r} was asked for by name"
    return None


def _twin(model: MADFormer, packed: Mapping[str, PackedConv2d | PackedLinear]) -> MADFormer:
    """A tree of its own over the same tensors, computing with the reference kernels, and these layers as they do."""
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, tensors)
    set_backend(twin, "reference")
    twin.attention_backend = "reference"
    if packed:
        # loads Inductor, which few need
        from madformer.engine.given import given

        for name in packed:
            twin.set_submodule(name, given(twin.get_submodule(name)))
    return twin


def _loaded(path: Path) -> tuple[Program | None, str | None]:
    try:
        return Program(path), None
    except OSError as error:
        return None, f"{path} does not load, remove it: {_line(error)}"
    except RuntimeError as error:
        return None, f"{path} cannot be called: {_line(error)}"


def _compile(step: Step, inputs: Sequence[Any], path: Path, threads: int, longest: int | None) -> str | None:
    """Write a package, for up to ``longest`` tokens of a cache or just these; or why there is none, in one line."""
    started = time.perf_counter()
    length = {2: torch.export.Dim("cached", min=LEAST_LENGTH, max=longest)} if longest else None
    weights, *others, cached = inputs
    dynamic = dict.fromkeys(weights), (*[None] * len(others), [(length, length) for _ in cached])
    options = {"cpp.threads": threads}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as scratch,
            warnings.catch_warnings(),
            torch.inference_mode(mode=False),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            given = tuple(tree_map(_like, inputs))
            exported = torch.export.export(step, given, dynamic_shapes=dynamic, strict=False)
            if exported.constants:
                return f"it holds tensors that are no weights: {', '.join(sorted(exported.constants))}"
            package = Path(scratch) / path.name
            torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=options)
            package.replace(path)
    except Exception as error:  # of a tracer and a compiler, which raise what they like: Python calls the step then
        return _line(error)
    rows, seconds = len(inputs[1]), time.perf_counter() - started
    logger.info("a denoising step of %d images was compiled in %.0f s, and is kept as %s", rows, seconds, path)
    return None


def _like(tensor: Tensor) -> Tensor:
    """One of the same strides, which are written into a program; a clone of a view has others."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def folder() -> Path:
    """Where programs are kept. Nothing else is there, and all of it may be removed."""
    return cache_folder("steps")


def key_of(built: Any, inputs: Sequence[Tensor], branches: int, dtype: torch.dtype, threads: int) -> str:
    """A hash of what a program was made of: model, shapes, this code, versions and machine."""
    shapes = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs]
    text = _text((built, shapes, branches, dtype, threads, _surroundings()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _surroundings() -> tuple[str, ...]:
    digest = hashlib.sha256()
    # not folders of one: without an install they lie apart
    for part in (MADFormer, Passes, dispatch):
        for source in sorted(Path(inspect.getfile(part)).parent.rglob("*.py")):
            digest.update(source.read_bytes())
    versions = (torch.__version__, importlib.metadata.version("diffusers"), torch.backends.cpu.get_cpu_capability())
    return digest.hexdigest(), *versions, platform.machine(), device_name(torch.device("cpu"))


def _text(value: Any) -> str:
    """Of a signature, the same in every process: without where tensors lie, and where the model came from."""
    if isinstance(value, Placed):
        return _text(value[1:])
    if isinstance(value, (tuple, list)):
        return f"({','.join(_text(item) for item in value if not _is_provenance(item))})"
    if isinstance(value, frozenset):
        return f"{{{','.join(sorted(map(_text, value)))}}}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _is_provenance(item: Any) -> bool:
    # diffusers' record of the configuration, which names the folder
    return isinstance(item, tuple) and len(item) == 2 and item[0] == "_internal_dict"
