"""Schedules of attentions of a run's plan, measured on the captions of profiling
(`decide/schedules.py`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .announce import begin
from .plans import latency_of

if TYPE_CHECKING:
    from ..decide.schedules import Errors
    from .folder import Run


def scheduled(run: Run, graph: OpGraph, table: SensitivityTable, plan: Plan) -> Plan:
    """The plan with the best schedule of attentions that was measured, by the final latents'
    squared error over the reference's.

    Args:
        run: the run; `config.allocate.schedule` says how many samplings, `config.profile` on what.
        graph: the model's graph.
        table: its sensitivities.
        plan: one choice for each layer.

    Returns:
        The plan with its schedule.

    Raises:
        InfeasibleBudget: no single setting of the attentions is within the budget.
    """
    from ..decide.schedules import search_schedule
    from ..measure.noise import noise_by_sample
    from ..measure.pipelines import model_of, sample
    from ..measure.quantized_weights import weights_for
    from ..measure.simulation import simulate
    from .calibrate import calibration_calls

    begin(run, "profile")
    c, pipe = run.config, run.pipe
    prompts = run.prompts(c.profile.samples, part=0)
    model = model_of(pipe, graph.components)
    weights = weights_for(model, graph, [plan], calibration_calls(run, graph, plan.schemes))
    reference = sample(pipe, prompts, run.sampling)

    with run.progress.track("measuring schedules", c.allocate.schedule) as advance:

        def measure(changed: Plan) -> Errors:
            with simulate(model, changed, graph, weights):
                made = sample(pipe, prompts, run.sampling)
            advance(1)
            return noise_by_sample(made, reference).numpy()

        found = search_schedule(
            graph,
            plan,
            c.profile.attentions,
            measure,
            steps=run.sampling.steps,
            evaluations=c.allocate.schedule,
            latency=latency_of(c.allocate, graph, table),
            seed=c.seed,
        )
    before, after = (-10 * math.log10(max(e, 1e-12)) for e in (found.start, found.error))
    run.progress.say(
        f"allocate: a schedule of {len(found.plan.steps)} ranges of steps, final latents "
        f"{after:.1f} dB; the best single setting has {before:.1f} ({found.measured} measured)"
    )
    made = found.plan
    if made.solver is None:
        return made
    return replace(made, solver=replace(made.solver, name=f"{made.solver.name}, schedule"))
