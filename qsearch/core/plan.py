"""BitPlan and Budget: which scheme each layer gets, and the only place where costs are computed.

Solvers are not believed: whatever they return is priced again here, and a plan that breaks its budget is never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .artifacts import Header, digest, read_json, write_json
from .errors import ArtifactError, InfeasibleBudget, QSearchError
from .graph import OpGraph
from .scheme import FULL_BITS, KEEP, Scheme

SCHEMA = "qsearch.plan/1"


@dataclass(frozen=True)
class Cost:
    """What a plan costs. `bits`: stored bits of all layers' weights; `average_bits`: per weight; `bytes`: rounded up, weights only.

    `bit_operations`: sum of MACs x weight bits x activation bits for one call on the example inputs.
    """

    bits: int
    average_bits: float
    bytes: int
    bit_operations: int


def cost(graph: OpGraph, layers: Mapping[str, Scheme]) -> Cost:
    """Cost of giving each layer of `graph` its scheme in `layers`. Raises `QSearchError` where a layer has none."""
    bits = operations = 0
    for layer in graph:
        if layer.name not in layers:
            raise QSearchError(f"a plan needs a scheme for every layer (keep is one); {layer.name} has none")
        scheme = layers[layer.name]
        bits += scheme.stored_bits(layer.weight_shape, layer.channel_axis, layer.parts)
        operations += layer.macs * scheme.bits * scheme.activation_bits
    return Cost(bits, bits / graph.weights, -(-bits // 8), operations)


@dataclass(frozen=True)
class Budget:
    """Upper limits that a plan must keep; None = no limit. At least one is given."""

    average_bits: float | None = None
    bytes: int | None = None
    bit_operations: float | None = None

    def __post_init__(self) -> None:
        if not self.limits:
            raise QSearchError("a budget needs at least one limit: average_bits, bytes or bit_operations")
        for name, limit in self.limits.items():
            if not limit > 0:
                raise QSearchError(f"a budget must be above zero; {name} is {limit}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by the name of the cost."""
        return {k: v for k, v in asdict(self).items() if v is not None}

    def excess(self, achieved: Cost) -> dict[str, tuple[float, float]]:
        """name -> (limit, achieved) for every limit that is broken."""
        return {k: (v, getattr(achieved, k)) for k, v in self.limits.items() if getattr(achieved, k) > v * (1 + 1e-12)}


@dataclass(frozen=True)
class Solver:
    """What the solver said: `status` (optimal, feasible, …), relative `gap`, `bound` on the objective, `seconds`."""

    name: str
    status: str
    gap: float | None = None
    bound: float | None = None
    objective: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class BitPlan:
    """A scheme for every layer of a graph. Build it with `BitPlan.make`, which prices it."""

    graph: str
    layers: dict[str, Scheme]
    achieved: Cost
    budget: Budget | None = None
    solver: Solver = Solver("given", "unsolved")
    header: Header | None = field(default=None, compare=False)

    @staticmethod
    def make(graph: OpGraph, layers: Mapping[str, Scheme | str], budget: Budget | None = None, solver: Solver | None = None) -> BitPlan:
        """Price `layers` on `graph`; refuses unknown layers, layers without a scheme, and a broken budget."""
        for name in layers:
            graph.layer(name)
        schemes = {layer.name: Scheme.parse(layers[layer.name]) for layer in graph if layer.name in layers}
        achieved = cost(graph, schemes)
        for layer in graph:
            if not layer.quantizable and schemes[layer.name].format != "keep":
                raise QSearchError(f"{layer.name} ({layer.kind}) can't be quantized; its scheme must be keep, not {schemes[layer.name]}")
        if budget is not None and (broken := budget.excess(achieved)):
            words = ", ".join(f"{k} {have:.6g} above its limit {limit:.6g}" for k, (limit, have) in broken.items())
            raise InfeasibleBudget(f"the plan breaks its budget: {words}")
        return BitPlan(graph.id, schemes, achieved, budget, solver or Solver("given", "unsolved"))

    @staticmethod
    def uniform(graph: OpGraph, scheme: Scheme | str) -> BitPlan:
        """The same scheme for every layer that can be quantized; the others keep full precision."""
        chosen = Scheme.parse(scheme)
        return BitPlan.make(graph, {layer.name: chosen if layer.quantizable else KEEP for layer in graph}, solver=Solver("uniform", "unsolved"))

    @property
    def id(self) -> str:
        """Digest of the graph and of the schemes."""
        return digest({"graph": self.graph, "layers": {k: str(v) for k, v in self.layers.items()}})

    @property
    def compression(self) -> float:
        """How many times smaller than 16 bits a weight."""
        return FULL_BITS / self.achieved.average_bits

    def save(self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0) -> None:
        """Write `plan.json`, one layer a line."""
        header = Header(SCHEMA, graph=self.graph, key=key, parents=dict(parents or {}), seed=seed)
        content: dict[str, Any] = {
            "budget": self.budget.limits if self.budget else None,
            "achieved": asdict(self.achieved),
            "solver": asdict(self.solver),
            "layers": {k: str(v) for k, v in self.layers.items()},
        }
        write_json(path, header, content, lines=("layers",))

    @staticmethod
    def load(path: Path, graph: OpGraph) -> BitPlan:
        """Read `plan.json` for `graph`; schemes are parsed, costs computed again and compared with the stored ones."""
        header, content = read_json(path, SCHEMA, graph.id)
        try:
            budget = Budget(**content["budget"]) if content["budget"] else None
            plan = BitPlan.make(graph, dict(content["layers"]), budget, Solver(**content["solver"]))
            stored = Cost(**content["achieved"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a whole plan ({type(error).__name__}: {error}); make it again with `qsearch allocate`") from error
        if stored.bits != plan.achieved.bits:
            raise ArtifactError(f"{path} says {stored.bits} stored bits, its layers take {plan.achieved.bits}; it was changed by hand, make it again")
        return BitPlan(plan.graph, plan.layers, plan.achieved, budget, plan.solver, header)
