"""diffusers' callbacks at the end of a step: what they see of a run, and what they change.

Shape legend: B images, C channels, H rows, W columns, R rows of a condition (B, or under guidance 2 B), P tokens of a
text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks
from torch import Tensor

from madformer.arguments import function, number, shown
from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine.progress import Change, Progress
from madformer.model import MADFormer
from madformer.model.blocks import from_blocks, to_blocks

Callback = Callable[[Any, int, Any, dict[str, Any]], Any]
DEFAULT_INPUTS = ("latents", "block")
CONDITIONS = ("prompt_embeds", "pooled_prompt_embeds", "add_text_embeds", "add_time_ids")
"""What diffusers' callbacks that end the guidance cut in half. Here they are for looking at alone."""


@dataclass(eq=False)
class RunState:
    """What diffusers keeps on the pipeline: of one call."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False


_RUNS: ContextVar[tuple[tuple[int, RunState], ...]] = ContextVar("runs", default=())
"""Of this thread, the innermost last, by the pipelines' ids."""


class CallbackPipeline(DiffusionPipeline):
    """The state that callbacks read and write, which every call has of its own.

    ``_guidance_scale`` and ``_interrupt`` may be assigned. In a callback they are those of the call that it is called
    by, after a call those that it left; ``_interrupt`` from elsewhere ends all calls that are under way.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = [*DEFAULT_INPUTS, *CONDITIONS]

    def __init__(self) -> None:
        super().__init__()
        self._last_run = RunState()
        self._under_way: set[RunState] = set()

    @contextlib.contextmanager
    def _running(self, state: RunState) -> Iterator[None]:
        token = _RUNS.set((*_RUNS.get(), (id(self), state)))
        self._under_way.add(state)
        try:
            yield
        finally:
            _RUNS.reset(token)
            self._under_way.discard(state)
            self._last_run = state

    @property
    def _run(self) -> RunState:
        own = [state for pipeline, state in _RUNS.get() if pipeline == id(self)]
        return own[-1] if own else self._last_run

    @property
    def guidance_scale(self) -> float:
        return self._run.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._run.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float) -> None:
        self._run.guidance_scale = number("guidance_scale", scale, 0)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of a call, over all blocks that it draws."""
        return self._run.num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._run.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._run.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        if any(pipeline == id(self) for pipeline, _ in _RUNS.get()):
            self._run.interrupt = interrupt
            return
        for state in list(self._under_way):
            state.interrupt = interrupt


def effective(guidance_scale: float) -> float:
    """diffusers' rule: guidance up to 1 is none."""
    return 1.0 if guidance_scale <= 1 else guidance_scale


def tensor_inputs(callback: Callback | None, names: Sequence[str] | None) -> list[str]:
    """What a callback is to be given, by itself where it says so.

    Raises:
        ValueError: something that there is not, or a callback that cannot run here.
    """
    function("callback_on_step_end", callback)
    parts = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
    if any(isinstance(part, IPAdapterScaleCutoffCallback) for part in parts):
        raise ValueError("IPAdapterScaleCutoffCallback has no place: these models have no IP adapter")
    if not (names is None or isinstance(names, (list, tuple))):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be a list of names, got {shown(names)}")
    wanted = list(getattr(callback, "tensor_inputs", None) or (DEFAULT_INPUTS if names is None else names))
    known = CallbackPipeline._callback_tensor_inputs
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"callback_on_step_end_tensor_inputs: no {unknown[0]!r} among {', '.join(known)}")
    return wanted


@dataclass
class StepEnd:
    """Calls a callback after every step, and tells the engine what it changed.

    Args:
        order: places of the blocks that are drawn, in their order. inputs: as :func:`tensor_inputs` gives them.
    """

    pipeline: CallbackPipeline
    state: RunState
    callback: Callback
    inputs: list[str]
    config: MADFormerConfig
    timesteps: Tensor
    order: Sequence[int]
    prompt: Prompt
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = effective(self.state.guidance_scale)

    def __call__(self, progress: Progress) -> Change:
        """Raises ``ValueError`` for latents of another shape, and for a condition that was changed."""
        latents = from_blocks(progress.images(), self.config)
        given = {name: self._input(name, latents, progress) for name in self.inputs}
        step = self.order.index(progress.block) * len(self.timesteps) + progress.step
        returned = self.callback(self.pipeline, step, self.timesteps[progress.step], dict(given))
        returned = returned if isinstance(returned, dict) else {}
        for name in CONDITIONS:
            if name in returned and not _is_end_of(returned[name], given.get(name)):
                raise ValueError(f"a callback changed {name}, which is for looking at: give another prompt to the call")
        images_BMLC = None
        if "latents" in self.inputs or "latents" in returned:
            images_BMLC = self._blocks_of(returned.get("latents", latents), latents)
        scale, before = effective(self.state.guidance_scale), self.scale
        self.scale = scale
        return Change(images_BMLC, None if scale == before else scale, stop=self.state.interrupt)

    def _input(self, name: str, latents_BCHW: Tensor, progress: Progress) -> Any:
        if name in DEFAULT_INPUTS:
            return {"latents": latents_BCHW, "block": progress.block}[name]
        model: MADFormer = self.pipeline.transformer
        rows = [ids for ids in (self.prompt.negative_text, self.prompt.text) if ids is not None]
        if name == "prompt_embeds" and rows:
            return model.embed_tokens(torch.cat(rows).to(model.device))
        # there is none in these models
        return latents_BCHW.new_zeros(len(latents_BCHW) * (1 if self.scale == 1 else 2), 0)

    def _blocks_of(self, latents: Any, like_BCHW: Tensor) -> Tensor:
        if not isinstance(latents, Tensor) or latents.shape != like_BCHW.shape:
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"a callback must give latents of the shape {tuple(like_BCHW.shape)}, got {got}")
        return to_blocks(latents.to(like_BCHW), self.config)


def _is_end_of(returned: Any, given: Any) -> bool:
    """Whether it is the tensor that was given, or its last rows: those without the unconditional half."""
    if returned is given:
        return True
    return isinstance(returned, Tensor) and isinstance(given, Tensor) and torch.equal(returned, given[-len(returned) :])
