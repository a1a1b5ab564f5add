"""allocate: the best plan within a budget, or one that is spelt out, in plan.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ..core.artifacts import Header, read_json
from ..core.cost import Budget
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.plan import SCHEMA, Plan
from ..core.scheme import FULL_BITS
from ..core.settings import Settings
from ..core.steps import StepRanges
from ..core.table import SensitivityTable
from ..decide.constraints import Constraints
from ..decide.objectives import Objective
from ..decide.ranges import counted
from ..decide.request import AllocationRequest
from .checks import check_patterns
from .endings import say_allocated
from .keys import file_digest, sampled, table_key
from .plans import (
    by_rival,
    carried_bytes,
    faster_only,
    fitted_apart,
    latency_of,
    plan_by_hand,
    predicted_loss,
    request_of,
    slower_in,
    with_inputs,
    with_sites,
)
from .ranges import check_ranges
from .refinement import refined
from .schedules import scheduled

if TYPE_CHECKING:
    from .folder import Run

#: stored bits a weight where no limit is given
DEFAULT_BITS = 4.0


class AllocateSettings(Settings):
    """The budget, what is minimised and what must hold, and who finds the plan.

    Layers are named by patterns over name, role or block.
    """

    average_bits: float | None = Field(
        None,
        description=f"stored bits a weight, scales included; {DEFAULT_BITS:g} where no limit is "
        "given at all",
    )
    bytes: int | str | None = Field(
        None,
        description="stored bytes of all weights, or their share of the bytes that these take in "
        "16 bits, such as 40%",
    )
    bit_operations: float | None = Field(
        None, description="MACs x weight bits x activation bits of one call"
    )
    activation_bytes: int | None = Field(
        None, description="bytes of all layers' inputs in one call, at their activation bits"
    )
    attention_share: float | None = Field(
        None, description="FLOPs of self-attentions over those of dense ones, mean over steps"
    )
    total_bit_operations: float | None = Field(
        None, description="`bit_operations` and those of attentions' products, mean over the steps"
    )
    latency: float | None = Field(None, description="seconds of one call on `device`")
    device: str | None = Field(
        None,
        description="where it runs: one of `qsearch list devices` (a roofline), or a latency.json "
        "that was measured; schemes that are slower there than keep are avoided where the budget "
        "can be met without them, or `latency` limits the time",
    )
    groups: dict[str, dict[str, float]] = Field(
        {}, description="pattern -> limit -> value, for those layers alone"
    )
    solver: str = Field(AllocationRequest.solver, description="plug-in of `qsearch list solvers`")
    metric: str = Field(
        AllocationRequest.metric, description="column of the sensitivity table that is minimised"
    )
    weights: dict[str, float] = Field(
        {}, description="metric -> weight, to minimise several at once instead of `metric`"
    )
    at_most: dict[str, float] = Field({}, description="metric -> largest total loss allowed")
    decibels: bool = Field(
        False, description="minimise the sum of decibels, as MixDQ does, to compare with"
    )
    tied: tuple[tuple[str, ...], ...] = Field(
        (), description="groups of layers that get one scheme"
    )
    fused: bool = Field(False, description="tie queries, keys and values that read one input")
    protected: tuple[str, ...] = Field((), description="patterns of layers that are kept")
    allowed: dict[str, tuple[str, ...]] = Field(
        {}, description="pattern -> schemes that its layers may have"
    )
    formats: int | None = Field(
        None, ge=0, description="at most so many formats in the plan, keep not counted"
    )
    target: str | None = Field(
        None,
        description="one of `qsearch list exporters`: choices and fused layers are what that tool "
        "can carry out",
    )
    seconds: float = Field(AllocationRequest.seconds, gt=0, description="time limit of the solver")
    layers: dict[str, str | tuple[str, ...]] = Field(
        {},
        description="a plan by hand instead of a budget: pattern -> scheme, or one for each range "
        "of steps; the first "
        "pattern that matches a layer counts",
    )
    sites: dict[str, str | tuple[str, ...]] = Field(
        {},
        description="pattern of tensors of attention (MODULE:q, k, v, softmax, output) -> what "
        "rounds them, e.g. keep+a8, "
        "or of whole ones (MODULE:attention) -> e.g. window8~rettention; or one for each "
        "range of steps",
    )
    inputs: dict[str, str] = Field(
        {},
        description="pattern -> what is added to the schemes of its layers, e.g. '+a8t~bos'; the "
        "first that matches counts",
    )
    steps: int = Field(
        1,
        ge=1,
        description="equal ranges of the sampler's steps between which the plan may differ",
    )
    share: Literal["weights", "none"] = Field(
        "weights",
        description="what the ranges have in common: one stored weight, or nothing (what "
        "calibration chooses is then "
        "fitted for each range)",
    )
    refine: int = Field(
        0,
        ge=0,
        description="rounds of refinement on the model itself; for plans that minimise noise alone",
    )
    schedule: int = Field(
        0,
        ge=0,
        description="at most so many whole samplings are measured to find which attentions compute "
        "what, and in which steps; instead of prices, for `attention_share`",
    )

    @property
    def budget(self) -> Budget:
        """The limits that are given; `DEFAULT_BITS` stored bits a weight where none is."""
        limits = {
            "average_bits": self.average_bits,
            "bytes": None if self._share else self.bytes,
            "bit_operations": self.bit_operations,
            "activation_bytes": self.activation_bytes,
            "attention_share": self.attention_share,
            "total_bit_operations": self.total_bit_operations,
            "latency": self.latency,
        }
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if self._share:  # of bytes in 16 bits is the same as stored bits a weight
            given["average_bits"] = min(self._share * FULL_BITS, self.average_bits or FULL_BITS)
        if not given and not any(self.groups.values()):
            given = {"average_bits": DEFAULT_BITS}
        return Budget(**given, groups=self.groups)  # type: ignore[arg-type]

    @property
    def _share(self) -> float:
        """The share of 16-bit bytes that `bytes` says; 0 where it says none."""
        if not isinstance(self.bytes, str):
            return 0.0
        try:
            share = float(self.bytes.removesuffix("%")) / 100
        except ValueError:
            share = 0.0
        if not self.bytes.endswith("%") or not 0 < share <= 1:
            raise QSearchError(
                "bytes are a whole number, or a share of 16-bit bytes from 0 to 100 such "
                f"as 40%; given {self.bytes!r}"
            )
        return share

    @property
    def ranges(self) -> StepRanges:
        """The ranges of the sampler's steps."""
        return StepRanges.equal(self.steps)

    @property
    def objective(self) -> Objective:
        """What is minimised, and which losses are limited."""
        return Objective(self.weights or {self.metric: 1.0}, self.at_most, self.decibels)

    @property
    def constraints(self) -> Constraints:
        """What must hold besides the budget."""
        return Constraints(self.tied, self.fused, self.protected, self.allowed, self.formats)

    def check_refinement(self) -> None:
        """Refuse what refinement can't do: other losses than noise, plans without a budget."""
        if not self.refine:
            return
        if self.decibels or self.at_most or set(self.objective.weights) != {"noise"}:
            raise QSearchError(
                "refinement measures the noise of the denoiser's output, and minimises it alone; "
                "leave weights, at_most and decibels out, or refine"
            )
        if self.layers or self.inputs:
            given = "layers" if self.layers else "inputs"
            raise QSearchError(
                "refinement moves weights within the budget; a plan by hand has none, and what "
                f"`inputs` adds is stored besides it: leave {given} out, or refine"
            )


def allocate(run: Run, graph: OpGraph, table: SensitivityTable, *, keep: bool = False) -> Plan:
    """The best plan within the run's budget, in plan.json.

    Args:
        run: the run; `config.allocate` says what is asked.
        graph: the model's graph.
        table: its sensitivities.
        keep: take a plan that was imported or edited by hand as it is, instead of making one.

    Returns:
        The plan. A plan.json that this command did not make is put aside before another one is
        written in its place.
    """
    check_patterns(run, graph.components)
    settings, path = run.config.allocate, run.path("plan.json")
    key = allocation_key(run, graph, table)
    known: Plan | None = run.found("plan.json", key, lambda p: Plan.load(p, graph))
    if known is not None and made_here(known):
        run.progress.say("allocate: plan.json is up to date")
        return known
    if keep and (given := _by_hand(path, graph)) is not None:
        run.progress.say(
            "allocate: plan.json was imported or edited by hand, and is kept; "
            f"`qsearch allocate {run.folder}` makes one by the config"
        )
        return given
    if settings.steps > 1:
        settings.ranges.members(run.sampling.steps)
    plan = make_plan(settings, graph, table)
    if settings.refine:
        plan = refined(run, graph, table, plan)
    if settings.schedule:
        plan = scheduled(run, graph, table, plan)
    check_ranges(run, plan)
    _put_aside(run, graph)
    parents = {"table": table_key(table), "choices": plan.id}
    plan.save(path, key=key, parents=parents, seed=run.config.seed)
    from .report import mark_old

    if mark_old(run.folder) and not run.whole:
        run.progress.say(
            "allocate: report.html is of the plan before; `qsearch evaluate "
            f"{run.folder}` measures "
            "this one and makes it anew"
        )
    if carried := carried_bytes(graph, plan):
        run.progress.say(
            f"allocate: {plan.achieved.attention_share:.1%} of dense attentions' FLOPs; they carry "
            f"{carried / 2**20:.3g} MB from step to step for the rows of one call, in 16 bits"
        )
    say_allocated(run, graph, table, plan)
    _say_slower(run, graph, table, plan)
    return plan


def _say_slower(run: Run, graph: OpGraph, table: SensitivityTable, plan: Plan) -> None:
    latency = latency_of(run.config.allocate, graph, table)
    if latency is None or not (slow := slower_in(plan, latency)):
        return
    listed = ", ".join(
        f"{scheme} ({count} layers, up to {times:.1f} times)"
        for scheme, (count, times) in sorted(slow.items())
    )
    run.progress.say(
        f"allocate: slower on {latency.device} than full precision, and within the limits only "
        f"so: {listed}"
    )


def allocation_key(run: Run, graph: OpGraph, table: SensitivityTable) -> str:
    """Digest of what a plan depends on: the table, the sizes of a call, the section, and the model
    where plans are measured.
    """
    c = run.config
    asked = c.allocate.model_dump()
    asked["budget"] = c.allocate.budget.content()
    if c.allocate.refine or c.allocate.schedule:
        asked["measured"] = [
            run.model_key,
            c.seed,
            sampled(run.sampling),
            c.profile.model_dump(include={"schemes", "samples", "batch"}) | {"bins": run.bins},
            c.calibrate.model_dump(),
            run.prompts(c.first_prompts, part=0).texts,
        ]
    timed = c.allocate.device if (c.allocate.device or "").endswith(".json") else None
    return run.key(
        "allocate",
        table=table_key(table),
        sizes=graph.sizes,
        timed=file_digest(Path(timed)) if timed else "",
        allocate=asked,
    )


def made_here(plan: Plan) -> bool:
    """Whether a plan's file was written by `allocate`, and says what it said then."""
    header = plan.header
    if header is None or header.key == "":
        return False
    return header.parents.get("choices", plan.id) == plan.id  # files of before don't say


def _by_hand(path: Path, graph: OpGraph) -> Plan | None:
    """The plan in a file that is whole and was not made by `allocate`."""
    try:
        plan = Plan.load(path, graph)
    except QSearchError:
        return None
    return None if made_here(plan) else plan


def _put_aside(run: Run, graph: OpGraph) -> None:
    """Keep a plan.json that `allocate` did not make, or that was changed since, under another
    name.
    """
    path = run.path("plan.json")
    if not path.is_file():
        return
    try:
        if made_here(Plan.load(path, graph)):
            return
    except QSearchError:
        header = _header(path)
        if header is not None and header.graph != graph.id and header.key:
            return  # ours, of the graph that was here before
    aside = path.with_name("plan.before.json")
    path.replace(aside)
    run.progress.say(
        "allocate: the plan.json that was here was not made by this command; it is "
        f"{aside.name} now"
    )


def _header(path: Path) -> Header | None:
    try:
        return read_json(path, SCHEMA)[0]
    except QSearchError:
        return None


def make_plan(settings: AllocateSettings, graph: OpGraph, table: SensitivityTable) -> Plan:
    """The best plan by the settings, or the one that they spell out.

    What `inputs` adds is stored besides the budget. Of formats of which the target has one, each is
    tried, and the plan of least loss is taken.
    """
    if settings.layers:
        plan = plan_by_hand(graph, settings.layers, settings.ranges)
    else:
        made = by_rival(settings, table, lambda rival: _made(settings, graph, table, rival))
        plan = min(made, key=predicted_loss)
    plan = with_inputs(graph, plan, settings.inputs)
    if settings.sites:
        plan = with_sites(graph, plan, settings.sites, counted(settings.ranges, table))
    return fitted_apart(graph, plan, settings.ranges) if settings.share == "none" else plan


def _made(settings: AllocateSettings, graph: OpGraph, table: SensitivityTable, rival: str) -> Plan:
    """The best plan with that one of the `rivals`."""
    from ..decide.allocation import allocate as verb

    asked = request_of(settings, graph, table, rival)
    quick = faster_only(
        asked.constraints or Constraints(),
        asked.latency if settings.latency is None else None,
        graph,
        table,
        settings.metric,
    )
    try:
        return verb(graph, table, settings.budget, replace(asked, constraints=quick))
    except QSearchError:  # the budget needs schemes that are slow here, or nothing would do
        return verb(graph, table, settings.budget, asked)
