"""How images are sampled: one object from the command line, the pipeline and a folder's settings to the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from madformer.arguments import interval, number, shown, whole_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled, whatever draws them; a field's comment is its line of help on the command line.

    Guidance is classifier-free (arXiv:2207.12598), at the timesteps of its interval (arXiv:2404.07724). In steps that
    ``refresh_every`` leaves out, what the diffusion layers added to the tokens last is added again, and the U-Net alone
    sees the noise of the step, as DeepCache (arXiv:2312.00858) has it for U-Nets: not the same image.

    Raises:
        ValueError: a count that is no whole number from 1 on, a scale that is no finite number from 0 on, or an
            interval that is not two numbers or does not rise.
    """

    steps: int = 25  # denoising steps of every block: more is slower, and finer up to a point (the released code: 250)
    guidance: float = 1.0  # scale of classifier-free guidance: from 2 to 5 follows the prompt more closely; 1 is none
    # LOW,HIGH: guide these timesteps alone, of 0 to 999, for more variety; unless given, all
    guidance_interval: tuple[float, float] | None = None
    refresh_every: int = 1  # run the diffusion layers in every so many steps alone: 2 or 3 is faster, and coarser

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "steps": whole_number("steps", self.steps, 1),
            "guidance": number("guidance", self.guidance, 0),
            "refresh_every": whole_number("refresh_every", self.refresh_every, 1),
        }
        if self.guidance_interval is not None:
            checked["guidance_interval"] = interval("guidance_interval", self.guidance_interval)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def check(cls, options: Any) -> None:
        """Raises ``ValueError`` for what is something else, such as a bare number of steps."""
        if not isinstance(options, cls):
            raise ValueError(f"options={shown(options)} must be {cls.__name__}(steps, ...)")

    @property
    def guided(self) -> bool:
        """Whether every image needs a second, unconditional pass."""
        return self.guidance != 1

    def guidance_at(self, timesteps_T: Tensor) -> Tensor:
        """The scale of guidance at each timestep, fp32."""
        low, high = self.guidance_interval or (-math.inf, math.inf)
        inside_T = (timesteps_T >= low) & (timesteps_T <= high)
        return (~inside_T).float().masked_fill(inside_T, self.guidance)

    def keywords(self) -> dict[str, Any]:
        """What a pipeline is called with, by the names that diffusers has."""
        options = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        interval = {} if self.guidance_interval is None else {"guidance_interval": self.guidance_interval}
        return options | interval | {"refresh_every": self.refresh_every}
