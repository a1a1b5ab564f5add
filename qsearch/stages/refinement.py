"""Refinement of a run's plan: changes that are priced and measured on the calls of profiling
(`decide/refinement.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .announce import begin
from .plans import constraints_of, faster_only, latency_of, rival_of, slower_in

if TYPE_CHECKING:
    from .folder import Run


def refined(run: Run, graph: OpGraph, table: SensitivityTable, plan: Plan) -> Plan:
    """The plan refined on the calls of profiling, with the codes that `evaluate` and `apply` would
    use.

    Args:
        run: the run; `config.allocate.refine` says how many rounds.
        graph: the model's graph.
        table: its sensitivities.
        plan: what is refined.

    Returns:
        The refined plan.

    Raises:
        QSearchError: the graph has components whose error the denoiser's output does not show.
    """
    from ..core.scheme import KEEP, Scheme
    from ..decide.neighbourhood import plans_around
    from ..decide.refinement import refine
    from ..measure.pipelines import denoisers_of, model_of, record
    from ..measure.quantized_weights import weights_for
    from .calibrate import calibration_calls

    begin(run, "profile")
    c = run.config
    if others := [n for n in graph.components if n not in denoisers_of(run.pipe)]:
        raise QSearchError(
            f"refinement measures the noise of the denoiser's output, which does not contain "
            f"{', '.join(others)}; leave refine out, or these out of components"
        )
    model = model_of(run.pipe, graph.components)
    offered = [Scheme.parse(s) for s in c.profile.schemes]
    prompts = run.prompts(c.profile.samples, part=0)
    calls = record(run.pipe, prompts, run.sampling, run.bins, c.profile.batch, graph.components)
    plans = plans_around(graph, plan, [*offered, KEEP], c.allocate.share)
    choosing = calibration_calls(run, graph, {s for one in plans for s in one.schemes})
    latency = latency_of(c.allocate, graph, table)
    rules = constraints_of(c.allocate, graph, table, rival_of(c.allocate, table, plan))
    if latency is not None and c.allocate.latency is None and not slower_in(plan, latency):
        rules = faster_only(rules, latency, graph, table, c.allocate.metric)
    found = refine(
        model,
        graph,
        plan,
        offered,
        calls,
        weights=weights_for(model, graph, plans, choosing),
        share=c.allocate.share,
        rounds=c.allocate.refine,
        seed=c.seed,
        constraints=rules,
        latency=latency,
    )
    kept = sum(r.kept for r in found.rounds)
    run.progress.say(
        f"allocate: refined, {kept} of {len(found.rounds)} rounds kept; noise power "
        f"{found.before:.3g} before, {found.noise:.3g} after"
    )
    return found.plan
