"""Euler scheduler of multistage flow matching, with the renoise between two stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...core.errors import QSearchError
from .stages import MULTISTAGE, RENOISES, Stages, jump


@dataclass
class MultistageFlowSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """`prev_sample`: latents [N, C, h, w] after the step."""

    prev_sample: Tensor


class MultistageFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Steps within a stage along the velocity, and jumps to the next stage.

    Args:
        stages: Number of stages.
        kind: "multistage" or "full" (`Stages`).
        renoise: What is added after upsampling: "corrected", "white" or "none"; a choice of the
            sampler, no training depends on it.
        sample_size: Side of the finest latents.
        num_train_timesteps: Timestep at noise level 1.
        prediction_type: What the flow network returns; only "flow".

    Raises:
        QSearchError: For an unknown kind, renoise or prediction type.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        stages: int = 3,
        kind: str = MULTISTAGE,
        renoise: str = "corrected",
        sample_size: int = 16,
        num_train_timesteps: int = 1000,
        prediction_type: str = "flow",
    ) -> None:
        if renoise not in RENOISES:
            raise QSearchError(f"renoise is one of {', '.join(RENOISES)}; given {renoise!r}")
        if prediction_type != "flow":
            raise QSearchError(f"this scheduler steps along flows; given {prediction_type!r}")
        self.stages = Stages(stages, sample_size, kind)
        self.set_timesteps(stages)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Noise levels of `num_inference_steps` steps in all, evenly spaced within each stage.

        Raises:
            QSearchError: When there are fewer steps than stages.
        """
        self.shares = self.stages.share(num_inference_steps)
        now, after = [], []
        for k, steps in enumerate(self.shares):
            levels = torch.linspace(self.stages.start(k), self.stages.end(k), steps + 1)
            now.append(levels[:-1])
            after.append(levels[1:])
        self.num_inference_steps = num_inference_steps
        self.sigmas, self.next_sigmas = torch.cat(now), torch.cat(after)
        self.timesteps = (self.sigmas * self.config.num_train_timesteps).to(device)
        self.stage_of_step = [k for k, steps in enumerate(self.shares) for _ in range(steps)]
        self._step_index = 0

    @property
    def step_index(self) -> int:
        """Number of steps taken since `set_timesteps`."""
        return self._step_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The latents as they are."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        return_dict: bool = True,
    ) -> MultistageFlowSchedulerOutput | tuple[Tensor]:
        """One Euler step within a stage.

        Args:
            model_output: Velocity [N, C, h, w] per unit of noise level.
            timestep: That of the step; steps are taken in order, and only counted.
            sample: Latents [N, C, h, w].
            return_dict: Whether to return an output class or a tuple.

        Returns:
            The latents after the step.

        Raises:
            QSearchError: After the last step.
        """
        i = self._step_index
        if i >= len(self.sigmas):
            raise QSearchError(f"all {len(self.sigmas)} steps are taken; call set_timesteps anew")
        change = float(self.next_sigmas[i] - self.sigmas[i])
        made = (sample.float() + change * model_output.float()).to(sample.dtype)
        self._step_index += 1
        return MultistageFlowSchedulerOutput(prev_sample=made) if return_dict else (made,)

    def jump(
        self,
        sample: Tensor,
        stage: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Latents at the end of stage `stage - 1` to those at the start of `stage`.

        Args:
            sample: [N, C, h, w].
            stage: The stage that starts, from 1 on.
            generator: Of the added noise; one, or one a sample.

        Returns:
            [N, C, 2h, 2w].
        """
        n, channels, side, _ = sample.shape
        shape = (n, channels, 2 * side, 2 * side)
        white = randn_tensor(shape, generator, sample.device, sample.dtype)
        return jump(sample, self.stages, stage, white, self.config.renoise)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
