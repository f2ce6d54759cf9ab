"""Where each image of a batch stands: latents, block, step and schedule, all on the device.

Shape legend: R rows (slots), N rows of the cache (R, or under guidance 2 R: all conditional ones, then all others),
B samples of a pass, M blocks, L latents of a block, C channels, T rows of a schedule, W numbers of such a row, E time
embedding, P tokens of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from madformer.conditioning.prompt import Prompt
from madformer.config import MADFormerConfig
from madformer.engine.options import SamplingOptions
from madformer.engine.rows import put, take
from madformer.kernels.denoise_step import NUM_COEFFICIENTS
from madformer.model import MADFormer
from madformer.model.blocks import block_order

# Leaves a sample as it is: what a slot does that waits while others step.
STAND_STILL = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ScheduleRows:
    """A schedule as its slots hold it: its steps, steps that change nothing up to T - 1 rows, and the finished block's.

    Attributes:
        coefficients_T6, timesteps_T, guidance_T: of every row.
    """

    num_steps: int
    coefficients_T6: Tensor
    timesteps_T: Tensor
    guidance_T: Tensor

    @classmethod
    def of(
        cls,
        config: MADFormerConfig,
        timesteps: Tensor,
        coefficients: Tensor | None,
        max_steps: int,
        options: SamplingOptions,
    ) -> ScheduleRows:
        """Rows of ``timesteps`` (S,), with a table's ``coefficients`` (S, 6) if there is one."""
        num_steps, num_rows = len(timesteps), num_rows_of(max_steps)
        # filled on the device: a run asks for its rows again and again, and would wait for a copy from the host
        coefficients_T6 = timesteps.new_empty(num_rows, NUM_COEFFICIENTS, dtype=torch.float32)
        for column_T, value in zip(coefficients_T6.unbind(1), STAND_STILL, strict=True):
            column_T.fill_(value)
        if coefficients is not None:
            coefficients_T6[:num_steps] = coefficients
        # the released sampler embeds the clean block with the last timestep of the previous block's loop
        clean = timesteps[-1:] if config.clean_timestep == "noisy" else timesteps.new_zeros(1)
        timesteps_T = torch.cat((timesteps, timesteps.new_zeros(num_rows - num_steps - 1), clean))
        return cls(num_steps, coefficients_T6, timesteps_T, options.guidance_at(timesteps_T))


def num_rows_of(max_steps: int) -> int:
    """T: every step, one to stand still at, and the one that a finished block is embedded with."""
    return max_steps + 2


class Slots:
    """The state of R images.

    Args:
        guided: each has an unconditional twin in the cache.

    Attributes:
        canvas_RMLC: each image, by place: noise in the blocks to come, clean latents in those that are done.
        order_RM: places in the order that each image's blocks are made in.
        latents_RLC, previous_RLC: the block at hand and the clean block predicted at the last step.
        block_R: how many blocks are done. at_R: the row of the schedule at hand, counted through all slots'
            schedules; at ``end_R`` the block at hand is done.
        sound_R: steps of this image so far after which every latent was finite. Numbers that are not finite stay so,
            hence it counts up to the first fault.
        text_NP: token ids of the text before each image. class_NC: what AdaLN is told of its class.
    """

    def __init__(
        self, config: MADFormerConfig, rows: int, max_steps: int, device: torch.device, *, guided: bool = False
    ) -> None:
        block = (config.latents_per_block, config.latent_channels)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.canvas_RMLC = zeros(config.num_blocks, *block)
        self.latents_RLC, self.previous_RLC = zeros(*block), zeros(*block)
        self.block_R, self.sound_R = (zeros(dtype=torch.int64) for _ in range(2))
        # all a step looks up, in one table: what the network is told of the time, guidance, coefficients of the update
        self.widths = (*config.told_widths, 1, NUM_COEFFICIENTS)
        self.schedule_RTW = zeros(num_rows_of(max_steps), sum(self.widths))
        self.schedule_RTW[..., -NUM_COEFFICIENTS:] = torch.tensor(STAND_STILL, device=device)
        self.branches = 2 if guided else 1
        self.text_NP = torch.zeros(self.branches * rows, config.text_length, dtype=torch.int64, device=device)
        classes = config.hidden_size if config.num_classes else 0
        self.class_NC = torch.zeros(self.branches * rows, classes, device=device)
        self.order_RM = torch.tensor(block_order(config), device=device).repeat(rows, 1)
        row_R = torch.arange(rows, device=device)
        # where each row's blocks and steps begin in canvas and schedule with their rows laid end to end
        self.first_block_R, self.start_R = row_R * config.num_blocks, row_R * num_rows_of(max_steps)
        self.at_R, self.end_R = self.start_R.clone(), self.start_R.clone()
        self.clean_R = self.start_R + num_rows_of(max_steps) - 1

    def assign(self, schedule: ScheduleRows, model: MADFormer, row: int | None = None) -> None:
        """Give a slot (all of them for None) a schedule, and put it before the first step of the first block."""
        rows = slice(None) if row is None else slice(row, row + 1)
        self.tabulate(schedule, model, row)
        self.end_R[rows] = self.start_R[rows] + schedule.num_steps
        self.reset(row)

    def tabulate(self, schedule: ScheduleRows, model: MADFormer, row: int | None = None) -> None:
        """Put into the schedule of a slot (all of them for None) what the weights, as they are now, make of it.

        The time embeddings are tabulated in fp32: the timestep is a raw integer, which bf16 cannot hold.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        parts = (schedule.timesteps_T, schedule.guidance_T[:, None], schedule.coefficients_T6)
        timesteps_T, *others = (part.to(self.schedule_RTW.device) for part in parts)
        columns = (*model.time_embeddings(timesteps_T), *others)
        self.schedule_RTW[rows] = torch.cat(columns, dim=-1)

    def condition_on(self, prompt: Prompt, model: MADFormer, row: int | None = None) -> None:
        """Give a slot (all of them for None) its prompt, which :meth:`Prompt.check` has passed."""
        rows = len(self.block_R)
        for branch, text in zip(range(self.branches), (prompt.text, prompt.negative_text), strict=False):
            where = slice(branch * rows, (branch + 1) * rows) if row is None else branch * rows + row
            if text is not None:
                self.text_NP[where] = text.to(self.text_NP)
            if prompt.label is not None:
                label = prompt.label.to(self.text_NP.device).reshape(-1)
                self.class_NC[where] = model.conditioner.label(torch.full_like(label, -1) if branch else label)

    def reset(self, row: int | None = None) -> None:
        """Put a slot (all of them for None) before the first step of the first block."""
        rows = slice(None) if row is None else slice(row, row + 1)
        self.block_R[rows], self.sound_R[rows], self.at_R[rows] = 0, 0, self.start_R[rows]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def place(self, rows_B: Tensor | None) -> Tensor:
        """Of the block at hand, ``(B,)``."""
        return self.order_RM.flatten().index_select(0, take(self.first_block_R + self.block_R, rows_B))

    def _in_canvas(self, rows_B: Tensor | None) -> Tensor:
        """The block at hand, among the blocks of all images."""
        return take(self.first_block_R, rows_B) + self.place(rows_B)

    def start_block(self, rows_B: Tensor | None) -> None:
        """Take the noise of the block at hand from the canvas."""
        blocks = self.canvas_RMLC.flatten(0, 1)
        put(self.latents_RLC, rows_B, blocks.index_select(0, self._in_canvas(rows_B)))
        put(self.at_R, rows_B, take(self.start_R, rows_B))

    def start_next_block(self, rows_B: Tensor | None) -> None:
        last = self.canvas_RMLC.shape[1] - 1
        # the row that fills up captured batches never leaves the image
        put(self.block_R, rows_B, (take(self.block_R, rows_B) + 1).clamp(max=last))
        self.start_block(rows_B)

    def finish_block(self, rows_B: Tensor | None) -> Tensor:
        """Put the block at hand into the canvas; returns its latents ``(B, L, C)``."""
        latents_BLC = take(self.latents_RLC, rows_B)
        self.canvas_RMLC.flatten(0, 1).index_copy_(0, self._in_canvas(rows_B), latents_BLC)
        return latents_BLC

    def schedule(self, rows_B: Tensor | None) -> list[Tensor]:
        """At each sample's step: what both U-Net halves ``(B, E)`` and AdaLN ``(B, C)`` are told of the time, guidance
        ``(B, 1)`` and coefficients ``(B, 6)``.
        """
        return self._look_up(take(self.at_R, rows_B))

    def clean_embedding(self, rows_B: Tensor | None) -> Tensor:
        """Time embedding ``(B, E)`` that finished blocks are passed through the U-Net with."""
        return self._look_up(take(self.clean_R, rows_B))[0]

    def _look_up(self, at_B: Tensor) -> list[Tensor]:
        return list(self.schedule_RTW.flatten(0, 1).index_select(0, at_B).split(self.widths, dim=1))

    def finish_step(self, rows_B: Tensor | None, latents_BLC: Tensor, previous_BLC: Tensor) -> None:
        """Keep what the update made of the samples, and count on."""
        put(self.latents_RLC, rows_B, latents_BLC)
        put(self.previous_RLC, rows_B, previous_BLC)
        sound_B, at_B = take(self.sound_R, rows_B), take(self.at_R, rows_B)
        sound_B += torch.linalg.vector_norm(latents_BLC, torch.inf, dim=(1, 2)) < torch.inf
        at_B += 1
        torch.minimum(at_B, take(self.end_R, rows_B), out=at_B)
        put(self.sound_R, rows_B, sound_B)
        put(self.at_R, rows_B, at_B)
