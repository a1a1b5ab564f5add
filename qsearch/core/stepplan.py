"""StepPlan: a plan for each bin of sampler steps, on disk as `stepplan.json`; every copy of a weight that it stores is paid for.

Bins that give a layer the same format share its weight, whatever its activations are quantized to; bins that give it different ones need
both copies at hand. So a step-wise plan is dearer than any of its bins, and wins only where early and late steps stand different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from .artifacts import Header, read_json, write_json
from .errors import ArtifactError, InfeasibleBudget, QSearchError
from .graph import LayerSpec, OpGraph
from .latency import Latency
from .plan import BitPlan, Budget, Cost, Solver, cost
from .scheme import Scheme

SCHEMA = "qsearch.stepplan/1"
UNSOLVED = Solver("given", "unsolved")


def copies(layer: LayerSpec, schemes: Sequence[Scheme], *, filled: bool = False) -> int:
    """Stored bits of a layer that is `schemes[i]` in bin i: of each different weight format once; `filled` as in `Scheme.stored_bits`."""
    return sum(
        s.stored_bits(layer.weight_shape, layer.channel_axis, layer.parts, filled=filled)
        for s in dict.fromkeys(s.weight_only for s in schemes)
    )


@dataclass(frozen=True)
class StepPlan:
    """`bins`: a plan for each bin of steps, the noisiest first. `achieved`: bits and bytes of all copies, the means over the bins of work and time,
    the largest bin of activation bytes. Build it with `StepPlan.make`.
    """

    bins: tuple[BitPlan, ...]
    achieved: Cost
    budget: Budget | None = None
    solver: Solver = UNSOLVED
    header: Header | None = field(default=None, compare=False)

    @staticmethod
    def make(
        graph: OpGraph,
        layers: Mapping[str, Sequence[Scheme | str]],
        budget: Budget | None = None,
        solver: Solver | None = None,
        *,
        latency: Latency | None = None,
    ) -> StepPlan:
        """Price `layers` (name -> a scheme for each bin) on `graph`; refuses layers with different numbers of bins, and a broken budget."""
        counts = {len(schemes) for schemes in layers.values()}
        if len(counts) != 1 or 0 in counts:
            raise QSearchError(
                f"a step-wise plan needs a scheme for every bin at every layer, as many each; given {sorted(counts)} of them"
            )
        if budget is not None and budget.groups:
            raise QSearchError(
                "a step-wise plan has no budgets for groups of layers; limit the whole"
            )
        bins = tuple(
            BitPlan.make(
                graph, {name: schemes[i] for name, schemes in layers.items()}, latency=latency
            )
            for i in range(counts.pop())
        )
        bits = sum(copies(layer, [b.layers[layer.name] for b in bins]) for layer in graph)
        costs = [cost(graph, b.layers, latency=latency) for b in bins]
        times = [c.latency for c in costs if c.latency is not None]
        achieved = Cost(
            bits,
            bits / graph.weights,
            -(-bits // 8),
            -(-sum(c.bit_operations for c in costs) // len(bins)),
            max(c.activation_bytes for c in costs),
            sum(times) / len(bins) if times else None,
        )
        if budget is not None and (broken := budget.excess(achieved)):
            words = ", ".join(
                f"{k} {have:.6g} above its limit {limit:.6g}" for k, (limit, have) in broken.items()
            )
            raise InfeasibleBudget(
                f"the step-wise plan breaks its budget: {words}; each copy of a weight counts"
            )
        return StepPlan(bins, achieved, budget, solver or UNSOLVED)

    def save(
        self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0
    ) -> None:
        """Write `stepplan.json`, one layer a line."""
        layers = {name: [str(b.layers[name]) for b in self.bins] for name in self.bins[0].layers}
        content = {
            "budget": self.budget.content() if self.budget else None,
            "achieved": asdict(self.achieved),
            "solver": asdict(self.solver),
            "layers": layers,
        }
        write_json(
            path,
            Header(
                SCHEMA, graph=self.bins[0].graph, key=key, parents=dict(parents or {}), seed=seed
            ),
            content,
            lines=("layers",),
        )

    @staticmethod
    def load(path: Path, graph: OpGraph) -> StepPlan:
        """Read `stepplan.json` for `graph`; costs are computed again, but for the time, which stands as it was stored."""
        header, content = read_json(path, SCHEMA, graph.id)
        try:
            budget = Budget(**content["budget"]) if content["budget"] else None
            plan = StepPlan.make(graph, dict(content["layers"]), None, Solver(**content["solver"]))
            stored = Cost(**content["achieved"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is not a whole step-wise plan ({type(error).__name__}: {error}); make it again"
            ) from error
        filled = sum(
            copies(layer, [b.layers[layer.name] for b in plan.bins], filled=True) for layer in graph
        )
        if stored.bits not in (plan.achieved.bits, filled):
            raise ArtifactError(
                f"{path} says {stored.bits} stored bits, its layers take {plan.achieved.bits}; it was changed by hand, make it again"
            )
        return replace(
            plan,
            achieved=replace(plan.achieved, latency=stored.latency),
            budget=budget,
            header=header,
        )
