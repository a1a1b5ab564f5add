"""BitPlan and Budget: which scheme each layer gets, and the only place where costs are computed.

Solvers are not believed: whatever they return is priced again here, and a plan that breaks its budget is never written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .artifacts import Header, digest, read_json, write_json
from .errors import ArtifactError, InfeasibleBudget, QSearchError, nearest
from .graph import LayerSpec, OpGraph
from .latency import Latency
from .scheme import FULL_BITS, KEEP, Scheme
from .sites import parted

SCHEMA = "qsearch.plan/1"
#: what a budget may limit, of the whole and (but for latency, whose rest belongs to no layer) of a group of layers
LIMITS = ("average_bits", "bytes", "bit_operations", "activation_bytes", "latency")


@dataclass(frozen=True)
class Cost:
    """What a plan costs. `bits`: stored bits of all layers' weights; `average_bits`: per weight; `bytes`: rounded up, weights only.

    `bit_operations`: sum of MACs x weight bits x activation bits for one call on the example inputs. `activation_bytes`: inputs of all
    layers in one call at their activation bits, rounded up (what MixDQ budgets; inputs, not the peak of an allocator). `latency`: seconds of
    one call by a latency table, None without one. `groups`: the same, but for latency, for each group of layers that a budget names.
    """

    bits: int
    average_bits: float
    bytes: int
    bit_operations: int
    activation_bytes: int = 0
    latency: float | None = None
    groups: dict[str, dict[str, float]] = field(default_factory=dict)


def select(graph: OpGraph, pattern: str) -> tuple[LayerSpec, ...]:
    """Layers whose name, role or block matches a pattern (`*` for anything). Raises `QSearchError` for one that matches nothing."""
    found = tuple(
        x
        for x in graph
        if any(fnmatchcase(text, pattern) for text in (x.name, x.role, x.block) if text)
    )
    if not found:
        known = {text for x in graph for text in (x.name, x.role, x.block) if text}
        raise QSearchError(
            f"a pattern must match the name, role or block of a layer; {pattern!r} matches nothing in {graph.model}{nearest(pattern, known)}"
        )
    return found


def cost(
    graph: OpGraph,
    layers: Mapping[str, Scheme],
    *,
    latency: Latency | None = None,
    groups: Iterable[str] = (),
) -> Cost:
    """Cost of giving each layer of `graph` its scheme in `layers`, and of each of `groups` alone. Raises `QSearchError` where a layer has none."""
    for layer in graph:
        if layer.name not in layers:
            raise QSearchError(
                f"a plan needs a scheme for every layer (keep is one); {layer.name} has none"
            )
    if latency is not None and latency.graph != graph.id:
        raise QSearchError(
            f"the latency table was made for graph {latency.graph}, {graph.model} is graph {graph.id}; time this model"
        )
    whole = _sums(graph, layers)
    shares = {
        pattern: {
            k: v
            for k, v in asdict(_sums(select(graph, pattern), layers)).items()
            if k in LIMITS and v is not None
        }
        for pattern in groups
    }
    return replace(
        whole,
        latency=None if latency is None else latency.total({x.name: layers[x.name] for x in graph}),
        groups=shares,
    )


def parts(layer: LayerSpec, scheme: Scheme) -> tuple[int, int, int]:
    """Stored bits, bit-operations and activation bits of one layer: what a plan's costs are sums of."""
    stored = scheme.stored_bits(layer.weight_shape, layer.channel_axis, layer.parts)
    return (
        stored,
        layer.macs * scheme.bits * scheme.activation_bits,
        layer.inputs * scheme.activation_bits,
    )


def _sums(held: Iterable[LayerSpec], layers: Mapping[str, Scheme]) -> Cost:
    bits = weights = operations = inputs = 0
    for layer in held:
        stored, computed, read = parts(layer, layers[layer.name])
        bits, operations, inputs, weights = (
            bits + stored,
            operations + computed,
            inputs + read,
            weights + layer.weights,
        )
    return Cost(bits, bits / weights, -(-bits // 8), operations, -(-inputs // 8))


@dataclass(frozen=True)
class Budget:
    """Upper limits that a plan must keep; None = no limit. At least one is given.

    `latency` is in seconds and needs a latency table. `groups`: pattern of layers (see `select`) -> limit -> value, for these layers alone.
    """

    average_bits: float | None = None
    bytes: int | None = None
    bit_operations: float | None = None
    activation_bytes: int | None = None
    latency: float | None = None
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.limits and not any(self.groups.values()):
            raise QSearchError(
                "a budget needs at least one limit: average_bits, bytes or bit_operations (or activation_bytes, or latency)"
            )
        for pattern, limits in self.groups.items():
            for name in limits:
                if name not in LIMITS or name == "latency":
                    raise QSearchError(
                        f"the group {pattern!r} can't be limited in {name!r}{nearest(name, LIMITS[:-1])}"
                    )
        flat = [
            *self.limits.items(),
            *(
                (f"{name} of {pattern!r}", x)
                for pattern, limits in self.groups.items()
                for name, x in limits.items()
            ),
        ]
        for name, limit in flat:
            if not limit > 0:
                raise QSearchError(f"a budget must be above zero; {name} is {limit}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the whole that are set, by the name of the cost."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def excess(self, achieved: Cost) -> dict[str, tuple[float, float]]:
        """name -> (limit, achieved) for every limit that is broken; those of groups are named `average_bits of 'pattern'`."""
        asked = {name: (limit, getattr(achieved, name)) for name, limit in self.limits.items()}
        for pattern, limits in self.groups.items():
            asked |= {
                f"{name} of {pattern!r}": (limit, achieved.groups[pattern][name])
                for name, limit in limits.items()
            }
        if any(have is None for _, have in asked.values()):
            raise QSearchError(
                "a budget in latency needs a latency table; give one of a device or of a file"
            )
        return {
            name: (limit, have)
            for name, (limit, have) in asked.items()
            if have > limit * (1 + 1e-12)
        }

    def content(self) -> dict[str, Any]:
        """The limits that are set, as plain data: `Budget(**content)` is the budget again."""
        return {
            **self.limits,
            **(
                {"groups": {pattern: dict(limits) for pattern, limits in self.groups.items()}}
                if self.groups
                else {}
            ),
        }


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
    """A scheme for every layer of a graph, and for such sites of attention (`core/sites.py`) as are not kept. Build it with `BitPlan.make`, which prices it."""

    graph: str
    layers: dict[str, Scheme]
    achieved: Cost
    budget: Budget | None = None
    solver: Solver = Solver("given", "unsolved")
    header: Header | None = field(default=None, compare=False)
    sites: dict[str, Scheme] = field(default_factory=dict)

    @staticmethod
    def make(
        graph: OpGraph,
        layers: Mapping[str, Scheme | str],
        budget: Budget | None = None,
        solver: Solver | None = None,
        *,
        latency: Latency | None = None,
    ) -> BitPlan:
        """Price `layers` (and sites, which store nothing) on `graph`; refuses unknown names, layers without a scheme, and a broken budget."""
        given, sites = parted(graph, layers)
        schemes = {layer.name: given[layer.name] for layer in graph if layer.name in given}
        achieved = cost(graph, schemes, latency=latency, groups=budget.groups if budget else ())
        for layer in graph:
            if not layer.quantizable and schemes[layer.name].format != "keep":
                raise QSearchError(
                    f"{layer.name} ({layer.kind}) can't be quantized; its scheme must be keep, not {schemes[layer.name]}"
                )
        _keep(budget, achieved)
        changed = {name: scheme for name, scheme in sites.items() if scheme != KEEP}
        return BitPlan(
            graph.id,
            schemes,
            achieved,
            budget,
            solver or Solver("given", "unsolved"),
            sites=changed,
        )

    @staticmethod
    def uniform(graph: OpGraph, scheme: Scheme | str) -> BitPlan:
        """The same scheme for every layer that can be quantized; the others keep full precision."""
        chosen = Scheme.parse(scheme)
        return BitPlan.make(
            graph,
            {layer.name: chosen if layer.quantizable else KEEP for layer in graph},
            solver=Solver("uniform", "unsolved"),
        )

    @property
    def id(self) -> str:
        """Digest of the graph and of the schemes."""
        said = {"graph": self.graph, "layers": {k: str(v) for k, v in self.layers.items()}}
        return digest(
            said | ({"sites": {k: str(v) for k, v in self.sites.items()}} if self.sites else {})
        )

    @property
    def compression(self) -> float:
        """How many times smaller than 16 bits a weight."""
        return FULL_BITS / self.achieved.average_bits

    def save(
        self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0
    ) -> None:
        """Write `plan.json`, one layer a line."""
        header = Header(SCHEMA, graph=self.graph, key=key, parents=dict(parents or {}), seed=seed)
        content: dict[str, Any] = {
            "budget": self.budget.content() if self.budget else None,
            "achieved": asdict(self.achieved),
            "solver": asdict(self.solver),
            "layers": {k: str(v) for k, v in self.layers.items()},
            **({"sites": {k: str(v) for k, v in self.sites.items()}} if self.sites else {}),
        }
        write_json(path, header, content, lines=("layers", "sites"))

    @staticmethod
    def load(path: Path, graph: OpGraph, *, latency: Latency | None = None) -> BitPlan:
        """Read `plan.json` for `graph`; schemes are parsed, costs computed again and compared with the stored ones.

        The time is computed again with a `latency` table; without one the stored time stands.
        """
        header, content = read_json(path, SCHEMA, graph.id)
        try:
            budget = Budget(**content["budget"]) if content["budget"] else None
            plan = BitPlan.make(
                graph,
                {**content["layers"], **content.get("sites", {})},
                None,
                Solver(**content["solver"]),
            )
            stored = Cost(**content["achieved"])
            achieved = cost(
                graph, plan.layers, latency=latency, groups=budget.groups if budget else ()
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is not a whole plan ({type(error).__name__}: {error}); make it again with `qsearch allocate`"
            ) from error
        if stored.bits not in (achieved.bits, _filled(graph, plan.layers)):
            raise ArtifactError(
                f"{path} says {stored.bits} stored bits, its layers take {achieved.bits}; it was changed by hand, make it again"
            )
        if latency is None and stored.latency is not None:
            if not isinstance(stored.latency, float | int) or not stored.latency >= 0:
                raise ArtifactError(
                    f"{path} says a latency of {stored.latency!r}, which is no time; make it again with `qsearch allocate`"
                )
            achieved = replace(achieved, latency=float(stored.latency))
        _keep(budget, achieved)
        return BitPlan(plan.graph, plan.layers, achieved, budget, plan.solver, header, plan.sites)


def _filled(graph: OpGraph, layers: Mapping[str, Scheme]) -> int:
    """Stored bits as a plan's file of before says them (`Scheme.stored_bits`)."""
    return sum(
        layers[x.name].stored_bits(x.weight_shape, x.channel_axis, x.parts, filled=True)
        for x in graph
    )


def _keep(budget: Budget | None, achieved: Cost) -> None:
    if budget is not None and (broken := budget.excess(achieved)):
        words = ", ".join(
            f"{k} {have:.6g} above its limit {limit:.6g}" for k, (limit, have) in broken.items()
        )
        raise InfeasibleBudget(f"the plan breaks its budget: {words}")
