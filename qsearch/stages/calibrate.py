"""Calibration of a run: the calls that schemes choose by, and weights as a plan stores them.

One place for both, so that profiling, refinement, evaluation, the packed model and exports choose
the same codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme

if TYPE_CHECKING:
    from ..measure.pipelines import Call
    from ..measure.quantized_weights import QuantizedWeights
    from ..measure.setting import Calibration
    from .folder import Run


def calibration_of(run: Run) -> Calibration:
    """What is recorded for calibration: prompts, sampler with a noise of its own, bins, batch."""
    from ..measure.setting import Calibration

    c = run.config
    prompts = run.prompts(c.calibrate.samples or c.profile.samples, part=0)
    return Calibration(prompts, run.sampling_for("calibrate"), c.calibrate)


def calibration_calls(
    run: Run, graph: OpGraph, schemes: Iterable[Scheme], *, always: bool = False
) -> list[Call]:
    """Recorded calls of the graph's components for schemes that choose by them, or that are learnt;
    none where none does, unless they are wanted `always`.
    """
    from ..choices.input_quantizer import needs_inputs

    learnt = run.config.reconstruct.order != "none"
    if not (always or learnt or any(needs_inputs(s) for s in schemes)):
        return []
    asked = calibration_of(run)
    with run.ticks("calibrate", len(asked.prompts), asked.options.batch):
        return asked.record(run.pipe, graph.components)


def plan_weights(
    run: Run, graph: OpGraph, plan: Plan, calls: Sequence[Call], *, learn: bool
) -> QuantizedWeights:
    """What `simulate` needs for a plan.

    Args:
        run: the run.
        graph: the model's graph.
        plan: the plan.
        calls: of `calibration_calls`.
        learn: whether it is reconstructed as the config says, besides being calibrated.

    Returns:
        Weights that carry out the plan's schemes.
    """
    from ..measure.pipelines import model_of
    from ..measure.reconstruction import reconstruct

    options = run.config.reconstruct
    if learn and options.order != "none":
        model = model_of(run.pipe, graph.components)
        return reconstruct(model, graph, plan, calls, options, seed=run.config.seed).weights
    return weights_together(run, graph, [plan], calls)


def weights_together(
    run: Run, graph: OpGraph, plans: Sequence[Plan], calls: Sequence[Call]
) -> QuantizedWeights:
    """What `simulate` needs for several plans: calibrated in one pass over the calls, nothing
    learnt.
    """
    from ..measure.pipelines import model_of
    from ..measure.quantized_weights import weights_for

    return weights_for(model_of(run.pipe, graph.components), graph, plans, calls)


def calibration_question(
    run: Run, schemes: Iterable[Scheme], *, always: bool = False
) -> dict[str, Any]:
    """What the choices of these schemes depend on, for keys; nothing where none is calibrated.

    `always`: where calls are recorded whatever the schemes are.
    """
    from ..choices.input_quantizer import needs_inputs

    c = run.config
    if not always and not any(needs_inputs(s) for s in schemes):
        return {}
    prompts = run.prompts(c.calibrate.samples or c.profile.samples, part=0)
    return {"calibrate": c.calibrate.model_dump(), "chosen_by": list(prompts.texts)}
