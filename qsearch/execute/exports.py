"""export(plan, graph, source, to, folder) -> files: a plan as another tool's file, checked before
it is written and read back after.

What the tool lacks is said beforehand, layer by layer, with what the rounding costs in predicted
noise; without `nearest` it is refused. The files are made beside their place, read back and
compared with the plan, and only then renamed, so that a file which says something else never
stands.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import plugins
from ..core.components import kind
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.leftovers import beside, clear
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..core.sites import check
from ..core.table import SensitivityTable
from ..decide.constraints import fused
from ..graphs.components import part_of
from .exporting import AbstractExporter, Export, every_name, formats, takes
from .weights import component

if TYPE_CHECKING:
    from ..choices.statistics import LayerInputs

_SHOWN = 5  # layers named in an error; all of them are said where they are rounded


@dataclass(frozen=True)
class Rounding:
    """A layer whose scheme the tool lacks. `noise`: what `given` adds to the predicted noise power
    over `asked`; None where it was not measured.
    """

    layer: str
    asked: Scheme
    given: Scheme
    noise: float | None = None

    def __str__(self) -> str:
        cost = "not measured" if self.noise is None else f"{self.noise:+.2e} predicted noise"
        return f"{self.layer}: {self.asked} -> {self.given} ({cost})"


def exporter(to: str) -> AbstractExporter:
    """The exporter of that name, its packages at hand. Raises `QSearchError` that says which `pip
    install` is missing.
    """
    plugin: AbstractExporter = plugins.load("exporters", to)
    for package in plugin.needs:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise QSearchError(
                f"exporting to {to} needs {', '.join(plugin.needs)}, and {package} is not "
                f"installed: pip install {package}"
            ) from None
    return plugin


def roundings(
    plan: Plan, graph: OpGraph, to: str, table: SensitivityTable | None = None
) -> list[Rounding]:
    """The layers whose schemes `to` lacks, in the graph's order, with what each costs by the
    table's `noise`.
    """
    plugin: AbstractExporter = plugins.load("exporters", to)
    known = table.values() if table is not None and "noise" in table.metrics else {}
    found = []
    for layer in graph:
        asked = plan.layers[layer.name]
        given = plugin.nearest(asked, layer)
        if given != asked:
            found.append(
                Rounding(layer.name, asked, given, _cost(known.get(layer.name, {}), asked, given))
            )
    return found


def by_role(rounded: Sequence[Rounding], graph: OpGraph) -> list[str]:
    """Roundings summed up: a line for each role and pair of schemes."""
    groups: dict[tuple[str, str, str], list[Rounding]] = {}
    for r in rounded:
        key = (graph.layer(r.layer).role, str(r.asked), str(r.given))
        groups.setdefault(key, []).append(r)
    lines = []
    for (role, asked, given), held in sorted(groups.items(), key=lambda item: -len(item[1])):
        known = [r.noise for r in held if r.noise is not None]
        cost = f"{sum(known):+.2e} predicted noise" if known else "not measured"
        if 0 < len(known) < len(held):
            cost += f" for {len(known)} of them"
        lines.append(f"{len(held)} x {role}: {asked} -> {given} ({cost})")
    return lines


def _cost(known: Mapping[str, float], asked: Scheme, given: Scheme) -> float | None:
    noise = {"keep": 0.0, **known}
    return (
        noise[str(given)] - noise[str(asked)]
        if str(given) in noise and str(asked) in noise
        else None
    )


@dataclass(frozen=True)
class ExportOptions:
    """What may be done for an export, and what it may look at.

    `nearest`: round what the tool lacks; else it is an error. `force`: take the place of an
    existing folder. `table`: prices the rounding. `calibration`: for methods that look at inputs
    (`measure.calibration`). `sampler_steps`: how many there are, for tools that count them.
    `variant`: of the weight files (fp16). `say`: called with what is rounded, a line a role, or
    with `verbose` a line a layer.
    """

    nearest: bool = False
    force: bool = False
    table: SensitivityTable | None = None
    calibration: Mapping[str, LayerInputs] | None = None
    sampler_steps: int = 20
    variant: str | None = None
    say: Callable[[str], None] = lambda line: None
    verbose: bool = False


def export(
    plan: Plan,
    graph: OpGraph,
    source: Path | str,
    to: str,
    folder: Path | str,
    options: ExportOptions | None = None,
    **named: Any,
) -> list[Path]:
    """Write `plan` as what the tool `to` loads, into `folder`.

    Args:
        plan: the plan.
        graph: the model's graph.
        source: diffusers folder of the pipeline that the plan is for.
        to: one of `qsearch list exporters`.
        folder: to be made; of a graph of several components it holds a folder for each. One that
            the tool doesn't take lies there unquantized, where the plan keeps it or `nearest`
            allows that.
        options: rounding, calibration and the like.
        named: fields of the options by their names, e.g. `nearest=True`.

    Returns:
        The files.

    Raises:
        QSearchError: for a missing package, a plan whose layers the graph or the weights lack, an
            existing folder, and files that read back as something else.
    """
    asked = replace(options or ExportOptions(), **named)
    plugin, source, folder = exporter(to), Path(source), Path(folder)
    _check(plan, graph)
    if folder.exists() and not (asked.force and folder.is_dir()):
        raise QSearchError(
            f"{folder} exists and would be overwritten; give --force, or another folder "
            "with --output"
        )
    jobs: dict[str, Export] = {}
    copies: list[str] = []
    if not graph.components:
        jobs = {"": _job(plugin, to, source, component(source), plan, graph, asked)}
    for name in graph.components:
        given = _part(plan, graph, asked, name)
        if kind(name) in takes(plugin):
            jobs[name] = _job(plugin, to, source, name, *given)
        else:
            copies.append(_left_out(plugin, to, name, *given))
    return _written(plugin, jobs, folder, to, [source / name for name in copies])


def _left_out(
    plugin: AbstractExporter,
    to: str,
    name: str,
    plan: Plan,
    graph: OpGraph,
    options: ExportOptions,
) -> str:
    """`name`, of a component that the tool doesn't take; said, and refused where the plan changes
    it and nobody allows the nearest.
    """
    changed = [site for site, held in plan.choices.items() if held != (KEEP,)]
    able = " or a ".join(takes(plugin))
    if changed and not options.nearest:
        raise QSearchError(
            f"{to} takes a component that is a {able}, and the plan changes "
            f"{len(changed)} layers of "
            f"{name}: keep them (allocate.protected: ['{name}.*']), or write {name} "
            "unquantized with --nearest"
        )
    lost = f"; what the plan says of {len(changed)} layers there is left out" if changed else ""
    options.say(f"{name}: {to} takes it in no format, so it is written unquantized{lost}")
    return name


def _part(
    plan: Plan, graph: OpGraph, options: ExportOptions, name: str
) -> tuple[Plan, OpGraph, ExportOptions]:
    """(plan, graph, options) of one of several components, by the names of its own model."""
    mine, cut = part_of(plan, graph, name)
    start = f"{name}."
    known = options.calibration
    if known is not None:
        known = {n.removeprefix(start): v for n, v in known.items() if n.startswith(start)}
    # The table is of the whole graph: roundings go without a price here.
    return mine, cut, replace(options, calibration=known, table=None)


def _job(
    plugin: AbstractExporter,
    to: str,
    source: Path,
    name: str,
    plan: Plan,
    graph: OpGraph,
    options: ExportOptions,
) -> Export:
    """What is written of the component `name`, with every layer in a scheme that the tool has."""
    say = options.say
    steps = plan if len(plan.steps) > 1 else None
    plan = _one_range(plan, graph, plugin, to)
    job = Export(plan, graph, source, name, options.calibration or {}, steps, options.sampler_steps)
    plan, graph, same = every_name(plan, graph)
    held = dict(job.calibration)
    for alias, first in same.items():  # names of tensors, and so of their layers
        known = job.calibration.get(first.rpartition(".")[0])
        if known is not None:
            held[alias.rpartition(".")[0]] = known
    job = replace(job, plan=plan, graph=graph, same=same, calibration=held, variant=options.variant)
    job.weights.check(graph)
    rounded = roundings(plan, graph, to, options.table)
    if rounded and not options.nearest:
        words = "; ".join(map(str, rounded[:_SHOWN])) + (
            f"; and {len(rounded) - _SHOWN} more" if len(rounded) > _SHOWN else ""
        )
        raise QSearchError(
            f"{to} lacks the schemes of {len(rounded)} layers: {words}. Round them with "
            f"--nearest, or allocate with --for {to}"
        )
    for line in map(str, rounded) if options.verbose else by_role(rounded, graph):
        say(line)
    if rounded:
        measured = [r.noise for r in rounded if r.noise is not None]
        say(
            f"{len(rounded)} layers rounded; {sum(measured):+.2e} predicted noise for the "
            f"{len(measured)} whose rounding was measured"
        )
    given = {**plan.layers, **{r.layer: r.given for r in rounded}}
    if plugin.fuses:
        given = _as_one(graph, given, to, options)
    return replace(job, plan=Plan.make(graph, given))


def _as_one(
    graph: OpGraph, given: Mapping[str, Scheme], to: str, options: ExportOptions
) -> dict[str, Scheme]:
    """Queries, keys and values in one scheme: the most precise of theirs where the nearest is
    allowed, else they must have one.
    """
    made, raised = dict(given), list[str]()
    for names in fused(graph):
        best = max((given[n] for n in names), key=lambda s: (s.bits, s.activation_bits))
        for name in names:
            if given[name] != best and not options.nearest:
                first = next(n for n in names if given[n] == best)
                raise QSearchError(
                    f"{first} and {name} are one layer for the readers of {to}, and the plan gives "
                    f"them {best} and {given[name]}: give them one scheme, take the most precise "
                    f"with --nearest, or allocate with --for {to}"
                )
            raised += [name] if given[name] != best else []
            made[name] = best
    if raised:
        options.say(f"{len(raised)} queries, keys and values take the most precise of their scheme")
    return made


def _check(plan: Plan, graph: OpGraph) -> None:
    if plan.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {plan.graph}, {graph.model} is graph "
            f"{graph.id}; make a plan for this model"
        )
    for name in plan.choices:
        check(graph, name)  # a name that matches nothing would silently do nothing in most tools
    for layer in graph:
        if layer.name not in plan.choices:
            raise QSearchError(
                f"a plan needs a scheme for every layer (keep is one); {layer.name} has none"
            )


def _one_range(plan: Plan, graph: OpGraph, plugin: AbstractExporter, to: str) -> Plan:
    """The plan of the range in the middle of the sampler.

    Raises:
        QSearchError: the plan says what no file of the tool can: something of an attention, or
            several ranges of steps.
    """
    if plan.sites:
        site = next(iter(plan.sites))
        raise QSearchError(
            f"no file of {to} says what happens inside attention; the plan has "
            f"{plan.text(site)} at {site}: keep it"
        )
    if len(plan.steps) == 1:
        return plan
    if not plugin.has_steps:
        raise QSearchError(
            f"a file of {to} holds for all sampler steps, and this plan has "
            f"{len(plan.steps)} ranges of them: allocate without "
            "--steps, or apply the plan with qsearch's own runtime"
        )
    return Plan.make(graph, plan.at(plan.steps.of(1, 2)), solver=plan.solver)


def _written(
    plugin: AbstractExporter,
    jobs: Mapping[str, Export],
    folder: Path,
    to: str,
    copies: Sequence[Path] = (),
) -> list[Path]:
    """Every component below a temporary folder, read back, and renamed into place at once.

    `copies`: folders of components that are written as they are.
    """
    made, old = beside(folder), beside(folder, "old")
    clear(folder, "tmp", "old")
    files: list[Path] = []
    try:
        for name, job in jobs.items():
            place = made / name if name else made
            place.mkdir(parents=True)
            files += [path.relative_to(made) for path in plugin.write(job, place)]
            difference(plugin.read(place, job.graph), job.plan.layers, to)
        for source in copies:
            shutil.copytree(source, made / source.name)
            held = sorted(path for path in (made / source.name).rglob("*") if path.is_file())
            files += [path.relative_to(made) for path in held]
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise QSearchError(
            f"cannot write {folder}: {error.strerror or error}; give a folder with room "
            "and write permission"
        ) from error
    finally:
        for rest in (made, old):
            with suppress(OSError):
                shutil.rmtree(rest)
    return [folder / file for file in files]


def difference(found: Mapping[str, Scheme], wanted: Mapping[str, Scheme], to: str) -> None:
    """Refuse files that read back as something else than the plan (methods aside), naming the first
    layer that differs.
    """
    for name, scheme in formats(wanted).items():
        if found.get(name) != scheme:
            raise QSearchError(
                f"what was written for {to} reads back differently: {name} is "
                f"{found.get(name)}, the plan says {scheme}; nothing was kept"
            )
    for name in found:
        if name not in wanted:
            raise QSearchError(
                f"what was written for {to} names {name}, which the plan lacks; nothing was kept"
            )
