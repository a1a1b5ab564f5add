"""A pipeline as small as one can be: one or two denoisers, guidance batched or in two calls, any
scheduler, a start in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A denoiser [N, 3, 6, 5] -> the same, that sees a caption [N, 2]."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, width, 3, padding=1)
        self.text = nn.Linear(2, width)
        self.out = nn.Conv2d(width, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        hidden = self.into(sample) * (1 + timestep.reshape(-1, 1, 1, 1) / 1000)
        return (self.out((hidden + self.text(encoder_hidden_states)[..., None, None]).tanh()),)


@dataclass
class Staged:
    """What diffusers' pipelines do, without diffusers: `boundary` is the share of the timesteps
    that `unet` takes.
    """

    unet: nn.Module
    scheduler: Any
    unet_2: nn.Module | None = None
    boundary: float = 0.0
    two_calls: bool = False

    __hash__ = object.__hash__

    @property
    def components(self) -> dict[str, Any]:
        """As of diffusers' pipelines."""
        return {"unet": self.unet, "unet_2": self.unet_2, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        num_inference_steps: int = 10,
        guidance_scale: float = 4.0,
        generator: Any = None,
        strength: float = 1.0,
        output_type: str = "latent",
    ) -> Any:
        assert output_type == "latent"
        x = torch.stack([torch.randn(3, 6, 5, generator=g) for g in generator])
        text = torch.tensor([[float(len(p)), float(p.count("a"))] for p in prompt]) / 10
        self.scheduler.set_timesteps(num_inference_steps)
        order = getattr(self.scheduler, "order", 1)
        start = (num_inference_steps - int(num_inference_steps * strength)) * order
        if start:
            self.scheduler.set_begin_index(start)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for t in self.scheduler.timesteps[start:]:
            late = self.unet_2 is not None and t < self.boundary * 1000
            net = self.unet_2 if late else self.unet
            assert net is not None
            scale = getattr(self.scheduler, "scale_model_input", None)
            given = x if scale is None else scale(x, t)
            if self.two_calls:
                cond = net(given, timestep=t, encoder_hidden_states=text)[0]
                plain = net(given, timestep=t, encoder_hidden_states=0 * text)[0]
            else:
                both = torch.cat([given, given])
                plain, cond = net(
                    both, timestep=t, encoder_hidden_states=torch.cat([0 * text, text])
                )[0].chunk(2)
            guided = plain + guidance_scale * (cond - plain)
            x = self.scheduler.step(guided, t, x, return_dict=False)[0]
        return (x,)


def staged(scheduler: str = "EulerDiscreteScheduler", *, two: bool = False, **more: Any) -> Staged:
    """A `Staged` pipeline of random weights."""
    import diffusers

    torch.manual_seed(3)
    made = Staged(Net().eval(), getattr(diffusers, scheduler)(), **more)
    if two:
        made.unet_2 = Net().eval()
        made.boundary = more.get("boundary", 0.6)
    return made
