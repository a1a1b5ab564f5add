"""Noise levels of multistage flow matching, and the corrected renoise between two stages.

Stage k of S works on latents averaged down by 2^(S-1-k). Its flow starts at noise level `start`
from a mix of noise and the upsampled latents of the stage before, and ends at noise level `end`.
Upsampling makes noise blocks of four equal pixels; adding noise that is negatively correlated
inside those blocks, at the right strength, makes it white again (Pyramid Flow, arXiv:2410.05954,
section 3.2, with equal shares of the noise levels).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import QSearchError

#: how the noise levels of the stages lie: each a part of the way, or each from noise to picture
MULTISTAGE, FULL = "multistage", "full"
KINDS = (MULTISTAGE, FULL)
#: what is added after upsampling: correlated noise, white noise of the same strength, or nothing
RENOISES = ("corrected", "white", "none")


@dataclass(frozen=True)
class Stages:
    """Sides and noise levels of the stages, coarse to fine.

    Args:
        count: Number of stages S, at least 1.
        side: Side of the finest latents, in pixels of the latents.
        kind: "multistage" (each stage a part of the noise levels) or "full" (each from 1 to 0,
            as in FlowAR, arXiv:2412.15205).
        gamma: Correlation of the added noise inside a 2x2 block, as a fraction of its variance
            plus itself; 1/3 removes the block's mean, and needs the least noise.

    Raises:
        QSearchError: For sides that the stages do not divide, or an unknown kind.
    """

    count: int
    side: int
    kind: str = MULTISTAGE
    gamma: float = 1 / 3

    def __post_init__(self) -> None:
        if self.count < 1:
            raise QSearchError(f"a flow has at least one stage; given {self.count}")
        if self.kind not in KINDS:
            raise QSearchError(f"stages are of the kind {' or '.join(KINDS)}; given {self.kind!r}")
        factor = 2 ** (self.count - 1)
        if self.side < factor or self.side % factor:
            near = max(1, round(self.side / factor)) * factor
            raise QSearchError(
                f"{self.count} stages halve the latents {self.count - 1} times, so their side must"
                f" be a multiple of {factor}; given {self.side}, the nearest is {near}"
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of the latents of each stage."""
        return tuple(self.side >> (self.count - 1 - k) for k in range(self.count))

    def end(self, stage: int) -> float:
        """Noise level at which a stage ends."""
        return 0.0 if self.kind == FULL else 1 - (stage + 1) / self.count

    def start(self, stage: int) -> float:
        """Noise level at which a stage starts, after the renoise."""
        if self.kind == FULL or stage == 0:
            return 1.0
        return 1 - self.renoise(stage)[0] * (1 - self.end(stage - 1))

    def renoise(self, stage: int) -> tuple[float, float]:
        """(alpha, beta) of the jump into `stage` > 0: x <- alpha * upsampled + beta * noise."""
        level = self.end(stage - 1)
        alpha = 1 / ((1 + 1 / self.gamma) ** 0.5 * level + 1 - level)
        return alpha, alpha * level / self.gamma**0.5

    def share(self, steps: int) -> tuple[int, ...]:
        """Steps of each stage out of `steps` in all: equal shares, the rest to the finest stages.

        Raises:
            QSearchError: When there are fewer steps than stages.
        """
        if steps < self.count:
            raise QSearchError(
                f"each of the {self.count} stages takes at least one step, so num_inference_steps"
                f" must be at least {self.count}; given {steps}"
            )
        each, rest = divmod(steps, self.count)
        return tuple(each + (k >= self.count - rest) for k in range(self.count))


def down(latents: Tensor, factor: int) -> Tensor:
    """Latents [N, C, H, W] averaged over squares of `factor` pixels."""
    return latents if factor == 1 else F.avg_pool2d(latents, factor)


def up(latents: Tensor) -> Tensor:
    """Latents [N, C, H, W] with each pixel twice as wide and high (nearest neighbour)."""
    return latents.repeat_interleave(2, -1).repeat_interleave(2, -2)


def correlated(white: Tensor, gamma: float) -> Tensor:
    """White noise [N, C, H, W] to noise of covariance (1 + gamma) I - gamma 11^T on 2x2 blocks."""
    mean = up(down(white, 2))
    within, across = (1 + gamma) ** 0.5, max(0.0, 1 - 3 * gamma) ** 0.5
    noise: Tensor = within * (white - mean) + across * mean
    return noise


def jump(latents: Tensor, stages: Stages, stage: int, white: Tensor, renoise: str) -> Tensor:
    """Latents at the end of a stage to those at the start of the next.

    Args:
        latents: [N, C, h, w] at the end of stage `stage - 1`.
        stages: The noise levels.
        stage: The stage that starts, at least 1.
        white: Standard normal noise [N, C, 2h, 2w].
        renoise: One of `RENOISES`; for stages of the kind "full" nothing of the latents is kept.

    Returns:
        Latents [N, C, 2h, 2w] at noise level `stages.start(stage)`.
    """
    if stages.kind == FULL:
        return white
    alpha, beta = stages.renoise(stage)
    larger: Tensor = alpha * up(latents)
    if renoise == "none":
        return larger
    return larger + beta * (correlated(white, stages.gamma) if renoise == "corrected" else white)


@dataclass(frozen=True)
class Sample:
    """What one stage trains on: a point between start and end, where it is, and the velocity.

    `point`, `velocity`: [N, C, h, w]; `level`: noise level [N]; `final`: latents at the end of the
    stage [N, C, h, w], which the transformer reads before it emits the next stage's map.
    """

    point: Tensor
    level: Tensor
    velocity: Tensor
    final: Tensor


def interpolate(stages: Stages, clean: Tensor, noise: Tensor, way: list[Tensor]) -> list[Sample]:
    """Training samples of every stage.

    Args:
        stages: The noise levels.
        clean: Latents [N, C, H, W] of the finest stage.
        noise: Standard normal noise [N, C, H, W]; the noise of coarse stages is twice its average,
            which keeps unit variance.
        way: For each stage the rest of its way [N] in [0, 1]: 1 at the start, 0 at the end.

    Returns:
        For each stage a `Sample`. The velocity is per unit of noise level, so a step from level
        a to level b adds (b - a) times the velocity, whatever the stage.
    """
    samples = []
    for k in range(stages.count):
        factor = 2 ** (stages.count - 1 - k)
        own, n = down(clean, factor), down(noise, factor) * factor
        first, last = stages.start(k), stages.end(k)
        begin = n
        if first < 1:
            begin = first * n + (1 - first) * up(down(clean, 2 * factor))
        final = last * n + (1 - last) * own
        u = way[k].view(-1, 1, 1, 1)
        velocity = (begin - final) / (first - last)
        level = last + (first - last) * way[k]
        samples.append(Sample(u * begin + (1 - u) * final, level, velocity, final))
    return samples


def flat(maps: list[Tensor]) -> Tensor | None:
    """Latents [N, C, h, w] of several stages as tokens [N, sum of h * w, C]; None for no stage."""
    return torch.cat([m.flatten(2).mT for m in maps], 1) if maps else None
