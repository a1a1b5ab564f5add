"""A weight as it is stored behind a scheme's transforms, with the statistics that its method goes
by there: for tools that have these transforms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..choices.input_quantizer import words_of
from ..choices.transform import AbstractStep, Site
from ..core.graph import LayerSpec
from ..core.plan import Plan
from .exporting import Export

if TYPE_CHECKING:
    from torch import Tensor


def rotation_word(group: int, layer: LayerSpec) -> str:
    """How a scheme spells a rotation of `group` channels (0: the largest that divides the layer's),
    without a number where it is the largest.
    """
    from ..choices.hadamard import group_of

    largest = group_of(layer.weight_shape[1])
    return "rotate" if group in (0, largest) else f"rotate{group}"


@dataclass(frozen=True)
class Turned:
    """What lies behind the transforms of one layer.

    Attributes:
        job: the export with the layer's scheme without transforms, and its statistics behind them.
        weight: what is quantized in place of the layer's weight, fp32.
        steps: the fitted transforms, in order.
    """

    job: Export
    weight: Tensor
    steps: tuple[AbstractStep, ...]


def turned(job: Export, layer: LayerSpec, weight: Tensor) -> Turned:
    """Fit the transforms of a linear layer's scheme, as measuring does.

    Args:
        job: the export.
        layer: a linear layer.
        weight: its weight [rows, columns].

    Returns:
        The weight behind them; the weight as it is where the scheme has none.

    Raises:
        QSearchError: a transform does not fit the layer.
    """
    scheme = job.plan.layers[layer.name]
    words = words_of(scheme)
    if not words:
        return Turned(job, weight, ())
    seen = job.calibration.get(layer.name)
    moved, steps = weight.float(), list[AbstractStep]()
    for word in words:
        step = word.plugin.fit(Site(moved[:, :, None], None, scheme, word.number, seen))
        steps.append(step)
        moved = step.weight(moved)
        seen = None if seen is None else step.statistics(seen)
    choices = {**job.plan.single, layer.name: replace(scheme, transforms=())}
    plan = Plan.make(job.graph, choices, solver=job.plan.solver)
    held = dict(job.calibration) if seen is None else {**job.calibration, layer.name: seen}
    return Turned(replace(job, plan=plan, calibration=held), moved, tuple(steps))
