"""Where each image of a batch stands: latents, block, step and schedule, all on the device.

Shape legend: R rows (slots), B samples of a pass, M blocks, L latents of a block, C channels, T rows of a schedule,
E time embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from madformer.config import MADFormerConfig
from madformer.engine.rows import put, take
from madformer.kernels.denoise_step import NUM_COEFFICIENTS
from madformer.model import MADFormer

# Leaves a sample as it is: what a slot does that waits while others step.
STAND_STILL = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ScheduleRows:
    """A schedule as its slots hold it, padded to T rows with steps that change nothing.

    Attributes:
        coefficients_T6, timesteps_T: of every step.
        clean_timestep_1: with which a finished block is embedded.
    """

    num_steps: int
    coefficients_T6: Tensor
    timesteps_T: Tensor
    clean_timestep_1: Tensor

    @classmethod
    def of(
        cls, config: MADFormerConfig, timesteps: Tensor, coefficients: Tensor | None, max_steps: int
    ) -> ScheduleRows:
        """Rows of ``timesteps`` (S,), with a table's ``coefficients`` (S, 6) if there is one."""
        num_steps = len(timesteps)
        coefficients_T6 = torch.tensor(STAND_STILL, device=timesteps.device).repeat(max_steps + 1, 1)
        if coefficients is not None:
            coefficients_T6[:num_steps] = coefficients
        timesteps_T = torch.cat((timesteps, timesteps.new_zeros(max_steps + 1 - num_steps)))
        # the released sampler embeds the clean block with the last timestep of the previous block's loop
        left_over = timesteps[-1:] if config.clean_timestep == "noisy" else timesteps.new_zeros(1)
        return cls(num_steps, coefficients_T6, timesteps_T, left_over)


class Slots:
    """The state of R images.

    Attributes:
        canvas_RMLC: each image: noise in the blocks to come, clean latents in those that are done.
        latents_RLC, previous_RLC: the block at hand and the clean block predicted at the last step.
        block_R, step_R: where a slot stands; a step equal to ``num_steps_R`` means that its block is done.
        sound_R: steps of this image so far after which every latent was finite. Numbers that are not finite stay so,
            hence it counts up to the first fault.
    """

    def __init__(self, config: MADFormerConfig, rows: int, max_steps: int, device: torch.device) -> None:
        block = (config.latents_per_block, config.latent_channels)
        embedding = config.unet.time_embed_dim

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.canvas_RMLC = zeros(config.num_blocks, *block)
        self.latents_RLC, self.previous_RLC = zeros(*block), zeros(*block)
        self.block_R, self.step_R, self.num_steps_R, self.sound_R = (zeros(dtype=torch.int64) for _ in range(4))
        self.coefficients_RT6 = zeros(max_steps + 1, NUM_COEFFICIENTS)
        self.coefficients_RT6[:] = torch.tensor(STAND_STILL, device=device)
        self.down_RTE, self.up_RTE = (zeros(max_steps + 1, embedding) for _ in range(2))
        self.clean_RE = zeros(embedding)
        row_R = torch.arange(rows, device=device)
        # where each row's blocks and steps begin in the tables above with their rows laid end to end
        self.first_block_R, self.first_step_R = row_R * config.num_blocks, row_R * (max_steps + 1)

    def assign(self, schedule: ScheduleRows, model: MADFormer, row: int | None = None) -> None:
        """Give a slot (all of them for None) a schedule, and put it before the first step of the first block.

        The time embeddings are tabulated in fp32 with the weights as they are now: the timestep is a raw integer,
        which bf16 cannot hold.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        down, up = model.downsampler.time_embedding, model.upsampler.time_embedding
        self.coefficients_RT6[rows] = schedule.coefficients_T6
        self.down_RTE[rows], self.up_RTE[rows] = down(schedule.timesteps_T), up(schedule.timesteps_T)
        self.clean_RE[rows] = down(schedule.clean_timestep_1)
        self.num_steps_R[rows] = schedule.num_steps
        self.reset(row)

    def reset(self, row: int | None = None) -> None:
        """Put a slot (all of them for None) before the first step of the first block."""
        for counter in (self.block_R, self.step_R, self.sound_R):
            counter[slice(None) if row is None else row] = 0

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in vars(self).values() if isinstance(x, Tensor))

    def start_block(self, rows_B: Tensor | None) -> None:
        """Take the noise of the block at hand from the canvas."""
        blocks = self.canvas_RMLC.flatten(0, 1)
        at_B = take(self.first_block_R + self.block_R, rows_B)
        put(self.latents_RLC, rows_B, blocks.index_select(0, at_B))
        if rows_B is None:
            self.step_R.zero_()
        else:
            self.step_R.index_fill_(0, rows_B, 0)

    def start_next_block(self, rows_B: Tensor | None) -> None:
        last = self.canvas_RMLC.shape[1] - 1
        # the row that fills up captured batches never leaves the image
        put(self.block_R, rows_B, (take(self.block_R, rows_B) + 1).clamp(max=last))
        self.start_block(rows_B)

    def finish_block(self, rows_B: Tensor | None) -> Tensor:
        """Put the block at hand into the canvas; returns its latents ``(B, L, C)``."""
        latents_BLC = take(self.latents_RLC, rows_B)
        at_B = take(self.first_block_R + self.block_R, rows_B)
        self.canvas_RMLC.flatten(0, 1).index_copy_(0, at_B, latents_BLC)
        return latents_BLC

    def schedule(self, rows_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients ``(B, 6)`` and time embeddings ``(B, E)`` of both U-Net halves at each sample's step."""
        at_B = take(self.first_step_R + self.step_R, rows_B)
        tables = self.coefficients_RT6, self.down_RTE, self.up_RTE
        coefficients, down, up = (table.flatten(0, 1).index_select(0, at_B) for table in tables)
        return coefficients, down, up

    def finish_step(self, rows_B: Tensor | None, latents_BLC: Tensor, previous_BLC: Tensor) -> None:
        """Keep what the update made of the samples, and count on."""
        put(self.latents_RLC, rows_B, latents_BLC)
        put(self.previous_RLC, rows_B, previous_BLC)
        sound_B = latents_BLC.abs().amax((1, 2)) < torch.inf
        put(self.sound_R, rows_B, take(self.sound_R, rows_B) + sound_B)
        step_B = take(self.step_R, rows_B) + 1
        put(self.step_R, rows_B, torch.minimum(step_B, take(self.num_steps_R, rows_B)))
