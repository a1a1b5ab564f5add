"""gates: limits that the run's plan must keep, and the smallest plan that keeps them, found by
measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.errors import InfeasibleBudget, QSearchError
from ..core.gates import GateFailed, failures, gates_of
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .allocate import make_plan
from .announce import begin
from .evaluate import OWN, evaluation_setting

if TYPE_CHECKING:
    from .folder import Run

#: stored bits a weight between which a plan is looked for, and their distance
_LEAST, _MOST, _STEP = 2.0, 8.0, 0.05
#: plans that are measured at most
EVALUATIONS = 8


def check_gates(spelt: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fail where a run's plan does not keep its gates.

    Args:
        spelt: the config's section `gates`.
        rows: results as in results.json.

    Returns:
        The gates that are kept, in words.

    Raises:
        GateFailed: naming every gate that fails, with what was measured.
        QSearchError: a gate's metric was not measured.
    """
    gates = gates_of(spelt)
    if not gates:
        return []
    metrics = next(row["metrics"] for row in rows if row["plan"] == OWN)
    if failed := failures(gates, metrics):
        raise GateFailed(f"the plan fails: {'; '.join(failed)}")
    return [str(gate) for gate in gates]


def smallest_passing(
    run: Run, graph: OpGraph, table: SensitivityTable, most: int = EVALUATIONS
) -> float:
    """The smallest budget whose plan keeps the run's gates, by bisection on measured plans.

    Every plan that is measured is kept in trials.db, so that a second call measures none again.
    Bisection rests on larger plans passing where smaller ones do; the plan of the budget that is
    returned was measured, and passes.

    Args:
        run: the run; `config.gates` says what must be kept, `config.allocate` how plans are made.
        graph: the model's graph.
        table: its sensitivities.
        most: plans that are measured at most.

    Returns:
        The budget in stored bits a weight, in steps of 0.05.

    Raises:
        QSearchError: the run has no gates, or no budget between 2 and 8 bits can be reached.
        GateFailed: not even the largest plan passes.
    """
    gates = gates_of(run.config.gates)
    if not gates:
        raise QSearchError(
            "the smallest plan that passes needs gates; write some, such as `gates: "
            "{ssim: '>= 0.9'}`"
        )
    plans = _plans(run, graph, table)
    if not plans:
        raise QSearchError(f"no budget from {_LEAST:g} to {_MOST:g} bits can be reached")
    bits = list(plans)
    measure = _measuring(run, graph, list(plans.values()))
    if failed := failures(gates, measure("gate 0", plans[bits[-1]])):
        raise GateFailed(
            f"not even {plans[bits[-1]].achieved.average_bits:.2f} stored bits a weight pass: "
            f"{'; '.join(failed)}"
        )
    low, high = -1, len(bits) - 1  # the first fails or is not known, the second passes
    for i in range(1, most):
        if high - low < 2:
            break
        middle = (low + high) // 2
        plan = plans[bits[middle]]
        passes = not failures(gates, measure(f"gate {i}", plan))
        run.progress.say(
            f"allocate: {plan.achieved.average_bits:.2f} stored bits {'pass' if passes else 'fail'}"
        )
        low, high = (low, middle) if passes else (middle, high)
    return bits[high]


def _plans(run: Run, graph: OpGraph, table: SensitivityTable) -> dict[float, Plan]:
    """Budget -> the plan that `allocate` would make of it, in order of size, each plan once."""
    found: dict[str, tuple[float, Plan]] = {}
    for i in range(round((_MOST - _LEAST) / _STEP) + 1):
        bits = round(_LEAST + _STEP * i, 2)
        settings = run.config.allocate.model_copy(update={"average_bits": bits})
        try:
            plan = make_plan(settings, graph, table)
        except InfeasibleBudget:
            continue
        found.setdefault(plan.id, (bits, plan))
    return dict(found.values())


def _measuring(
    run: Run, graph: OpGraph, plans: Sequence[Plan]
) -> Callable[[str, Plan], Mapping[str, Sequence[float]]]:
    """What measures a plan under a name, or finds it in the run's trials; the model is loaded with
    the first that is missing.
    """
    from ..core.trials import Trials
    from ..measure.evaluation import directions
    from ..measure.plan_evaluation import EvaluationTask, EvaluationWorker

    setting = evaluation_setting(run, plans)
    trials = Trials(run.path("trials.db"), graph)
    bench: list[EvaluationWorker] = []

    def measure(name: str, plan: Plan) -> Mapping[str, Sequence[float]]:
        if (known := trials.find(plan, setting.key)) is not None:
            return known.metrics
        if not bench:
            begin(run, "evaluate")
            task = EvaluationTask(run.model_folder, graph, setting, run.path("trials.db"))
            bench.append(EvaluationWorker(task, run.pipe, {plan.id: plan for plan in plans}))
        found, samples, _ = bench[0].measure(plan)
        better = directions(setting.metrics)
        trials.add(name, plan, found, setting.key, samples=samples, higher_is_better=better)
        return found

    return measure
