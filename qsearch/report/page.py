"""A run as one page that needs no network: what was asked, what came out, why, and where it comes
from.

The page is a file to send to somebody: pictures and plots are inside it, it asks nothing of a
network, reads on a telephone and on a screen, in a light and in a dark scheme. A short script of
its own (`page.js`) searches, sorts and folds; without it everything is there. The template
`page.html.j2` escapes everything that comes from data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifacts import Header, read_json, redacted, write_text
from ..core.attentions import PART
from ..core.cost import cost
from ..core.errors import ArtifactError
from ..core.graph import OpGraph
from ..core.plan import SCHEMA, Plan, said
from ..core.scheme import Scheme
from ..core.sites import cut
from ..core.table import SensitivityTable
from ..core.units import number_of, size_of
from . import plots, tables
from .findings import Findings
from .fold import MANY, fold, home, short_block
from .fold_svg import bits_map, legend, noise_map
from .page_plots import draw_plots, qualities
from .page_sheet import sheet_of
from .pictures import Sample, contact_sheet, makes_none, picture_path
from .style import FAMILY_COLOURS

if TYPE_CHECKING:
    from markupsafe import Markup


def write_report(folder: Path, found: Findings, key: str = "") -> None:
    """Write `contact_sheet.png` and `report.html` into a run's `folder`.

    Args:
        folder: the run's, which holds the pictures of the plans in `found.rows`.
        found: what the page shows.
        key: digest of all that, kept in the page so that `is_current` can tell whether it must be
            written again.

    Raises:
        ArtifactError: for a table of another graph, and pictures that are not there.
    """
    found.table.check(found.graph)
    folder = Path(folder)
    labels = {name: f"{name}\n{found.bits[name]:.2f} bits" for name in found.shown}
    samples = (
        []
        if any(makes_none(picture_path(folder, name)) for name in found.shown)
        else contact_sheet(folder / "contact_sheet.png", folder, labels, found.captions)
    )
    write_text(folder / "report.html", _page(folder, found, samples, key))


def is_current(folder: Path, key: str) -> bool:
    """Whether the folder's report was written with this `key`."""
    page = Path(folder) / "report.html"
    return (
        page.is_file()
        and (
            (Path(folder) / "contact_sheet.png").is_file()
            or makes_none(picture_path(Path(folder), "full precision"))
        )
        and f'name="qsearch-key" content="{key}"' in page.read_text(encoding="utf-8")
    )


def _page(folder: Path, found: Findings, samples: Sequence[Sample], key: str) -> str:
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    page.filters |= {"db": _db, "number": _number, "percent": _percent, "breakable": _breakable}
    page.filters["bytes"] = lambda kilobytes: size_of(1000 * kilobytes)
    page.filters["colour"] = lambda role: FAMILY_COLOURS[plots.family(role)]
    graph, table, plan, rows, metric = (
        found.graph,
        found.table,
        found.plan,
        found.rows,
        found.metric,
    )
    values = table.values(metric)
    schemes = plots.by_size(graph, {s for row in values.values() for s in row})
    attentions = sorted({s for row in values.values() for s in row if Scheme.parse(s).attention})
    middle = _middle(graph, plan, schemes)
    columns, measured = tables.results(rows)
    drawn = draw_plots(found, middle)
    page.filters |= {"groupby_home": _by_home, "bits": _mean_bits, "least": _least}
    by_role = tables.bits_by_role(graph, table, plan, middle, metric=metric)
    return page.from_string(
        files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    ).render(
        model=graph.model,
        title=f"{plan.achieved.average_bits:.2f} stored bits a weight",
        summary=_summary(graph, plan, rows),
        asked=_asked(graph, plan, schemes, attentions, found.captions),
        captions=found.captions,
        columns=columns,
        rows=measured,
        sheet=sheet_of(folder, found, samples),
        plots=drawn,
        qualities=[name for name in qualities(rows) if name in drawn],
        bits_words=_bits_words(plan, by_role) + _component_words(graph, plan),
        roles=by_role,
        middle=middle,
        schemes=schemes,
        predicted=plots.decibels(tables.predicted_noise(table, plan, metric=metric)),
        reasons=tables.reasons(graph, table, plan, metric=metric),
        layers=_layers(graph, plan, values, schemes),
        provenance=_provenance(graph, table, plan, _header(folder, graph, plan)),
        config=_config(folder),
        target=found.target or "torchao",
        planned_for=bool(found.target),
        folded=_folded(graph, plan, values, middle) if len(graph.layers) > MANY else {},
        script=Markup(files(__package__).joinpath("page.js").read_text(encoding="utf-8")),
        key=key,
    )


def _folded(
    graph: OpGraph, plan: Plan, values: Mapping[str, Mapping[str, float]], scheme: str
) -> dict[str, Any]:
    """Maps of blocks by roles, for models whose layers would be hairs in a figure, and an example
    of a shortened name.
    """
    found = fold(graph, plan, values, scheme)
    maps = {"bits": bits_map, "noise": noise_map}
    longest = max(found.blocks, key=len)
    drawn: dict[str, Any] = {
        kind: {
            "wide": draw(found),
            "narrow": draw(found, narrow=True),
            "legend": legend(kind, found),
        }
        for kind, draw in maps.items()
    }
    return drawn | {"example": f"{short_block(longest)} is {longest.partition(' … ')[0]}"}


def _by_home(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Layers by the block that they lie in, in order of execution."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        found.setdefault(str(layer["home"]), []).append(layer)
    return list(found.items())


def _mean_bits(layers: Sequence[Mapping[str, Any]]) -> float:
    whole = sum(layer["weights"] for layer in layers)
    return float(sum(layer["stored"] * layer["weights"] for layer in layers) / max(1, whole))


def _least(layers: Sequence[Mapping[str, Any]], scheme: str) -> float:
    """The decibels of the most sensitive layer; NaN where none was measured."""
    known = [d for layer in layers if not math.isnan(d := layer["decibels"][scheme])]
    return min(known, default=math.nan)


def _middle(graph: OpGraph, plan: Plan, schemes: Sequence[str]) -> str:
    """The scheme whose uniform plan is nearest in size to the plan: where its choices differ
    most.
    """
    return min(
        schemes, key=lambda s: abs(Plan.uniform(graph, s).achieved.bits - plan.achieved.bits)
    )


def _db(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}".replace("-", "\N{MINUS SIGN}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else "< 0.1%"


def _breakable(name: str) -> Markup:
    """A layer's name, escaped, that a browser may break after its dots."""
    from markupsafe import Markup, escape

    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _summary(graph: OpGraph, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    """The outcome in two or three sentences; one of them where attentions are sparse, and one where
    the denoiser's output was measured for the plan and for others.
    """
    first = (
        f"The plan stores {number_of(graph.weights)} weights in {size_of(plan.achieved.bytes)}, "
        f"{plan.compression:.1f} times smaller than at 16 bits."
    )
    share = plan.achieved.attention_share
    if share < 1:
        first += (
            f" Its self-attentions take {share:.0%} of the FLOPs of dense ones, which those of "
            "uniform plans are."
        )
    found = {
        str(r["plan"]): r["metrics"][m]
        for r in rows
        for m in ("output_sqnr",)
        if m in r["metrics"] and r["plan"] != plots.FULL_PRECISION
    }
    if "plan" not in found or len(found) < 2:
        return first
    ours, error = found.pop("plan")
    others = ", ".join(f"{name} {mean:.1f} ± {e:.1f} dB" for name, (mean, e) in found.items())
    return (
        f"{first} The denoiser's output stands {ours:.1f} ± {error:.1f} dB above its error; the "
        f"plans beside it: {others}."
    )


#: limit -> its unit, for people
UNITS = {
    "average_bits": "stored bits a weight",
    "bytes": "bytes of weights",
    "bit_operations": "bit operations a call",
    "activation_bytes": "bytes of layers' inputs a call",
    "attention_share": "of the FLOPs of dense attentions",
    "total_bit_operations": "bit operations a call, attention included",
    "latency": "seconds a call",
}


def _limits(plan: Plan) -> str:
    """The budget in words, those of groups of layers too."""
    if plan.budget is None:
        return "none"
    words = [f"at most {limit:,.10g} {UNITS[name]}" for name, limit in plan.budget.limits.items()]
    words += [
        f"at most {limit:,.10g} {UNITS[name]} in {pattern}"
        for pattern, limits in plan.budget.groups.items()
        for name, limit in limits.items()
    ]
    return ", ".join(words)


def _asked(
    graph: OpGraph,
    plan: Plan,
    schemes: Sequence[str],
    attentions: Sequence[str],
    captions: Sequence[str],
) -> list[tuple[str, str]]:
    quoted = "; ".join(f"“{c}”" for c in captions[:2])
    return [
        ("model", graph.model),
        (
            "size",
            (
                f"{len(graph.layers)} layers, {number_of(graph.weights)} weights, "
                f"{number_of(graph.total_macs)} multiply-accumulates a call"
            ),
        ),
        ("budget", _limits(plan)),
        ("choices", ", ".join([*schemes, *attentions, "keep (full precision)"])),
        ("captions", f"{len(captions)}, such as {quoted}" if captions else "none"),
    ]


def _component_words(graph: OpGraph, plan: Plan) -> str:
    """What each component of a graph of several got."""
    if not graph.components:
        return ""
    patterns = {name: f"{name}.*" for name in graph.components}
    held = cost(graph, plan.choices, plan.steps, groups=patterns.values()).groups
    parts = [
        (
            f"{name} {held[p]['average_bits']:.1f} stored bits a weight "
            f"({held[p]['bytes'] / 1000:,.0f} kB)"
        )
        for name, p in patterns.items()
    ]
    return f" By component: {', '.join(parts)}."


def _bits_words(plan: Plan, by_role: Sequence[tables.RoleBits]) -> str:
    counts: dict[int, int] = {}
    for choices in plan.weights.values():
        counts[choices[0].bits] = counts.get(choices[0].bits, 0) + 1
    kinds = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(counts.items()))
    words = f"Of {len(plan.weights)} layers, {kinds}."
    whole = [name for name in plan.sites if cut(name)[1] == PART]
    if rounded := len(plan.sites) - len(whole):
        words += f" Of {rounded} tensors of attention something is rounded."
    if whole:
        words += (
            f" {len(whole)} attentions are computed in another way, such as "
            f"{cut(whole[0])[0]} by {plan.text(whole[0])}: "
            f"{plan.achieved.attention_share:.0%} of the attention FLOPs of dense ones are left."
        )
    if len(plan.steps) > 1:
        several = sum(len(held) > 1 for held in plan.choices.values())
        words += (
            f" The sampler's steps are cut into {len(plan.steps)} ranges, and {several} "
            "sites differ between them"
            " (bits are those of the first range)."
        )
    most, least = by_role[0], by_role[-1]
    if most.average_bits > least.average_bits:
        words += (
            f" The most went to {most.role} ({most.average_bits:.1f} stored bits a weight), the "
            f"least to {least.role} ({least.average_bits:.1f})."
        )
    return words


def _layers(
    graph: OpGraph, plan: Plan, values: Mapping[str, Mapping[str, float]], schemes: Sequence[str]
) -> list[dict[str, Any]]:
    data = plots.layer_bits(graph, plan)
    return [
        {
            "name": layer.name,
            "home": home(layer),
            "weights": layer.weights,
            "role": layer.role,
            "shape": " × ".join(map(str, layer.weight_shape)),
            "scheme": plan.text(layer.name),
            "stored": stored,
            "decibels": {
                s: plots.decibels(values.get(layer.name, {}).get(s, 0.0)) for s in schemes
            },
        }
        for layer, stored in zip(graph, data.stored, strict=True)
    ]


def _header(folder: Path, graph: OpGraph, plan: Plan) -> Header | None:
    """The plan's header; a plan that was just made has none, its file in the run has."""
    if plan.header is not None:
        return plan.header
    with suppress(ArtifactError):
        header, content = read_json(folder / "plan.json", SCHEMA, graph.id)
        if content.get("sites") == said(plan.choices):
            return header
    return None


def _provenance(
    graph: OpGraph, table: SensitivityTable, plan: Plan, header: Header | None
) -> list[tuple[str, str]]:
    s = plan.solver
    solved = [f"{s.name}: {s.status}"]
    solved += [f"gap {s.gap:.2g}"] if s.gap is not None else []
    solved += [f"bound {s.bound:.4g}"] if s.bound is not None else []
    solved += [f"objective {s.objective:.4g}"] if s.objective is not None else []
    estimators = ", ".join(sorted(table.frame["estimator"].unique()))
    found = [
        ("graph", graph.id),
        ("plan", plan.id),
        ("solver", ", ".join([*solved, f"{s.seconds:.2f} s"])),
        (
            "sensitivity",
            (
                f"{len(table.frame):,} measurements by {estimators}, "
                f"{len(table.at_floor()):,} of them at the measurement floor"
            ),
        ),
    ]
    if header is None:
        return [*found, ("made by", "not recorded: the plan has no file in this run")]
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    return [
        *found,
        ("seed", str(header.seed)),
        ("command", redacted(header.command)),
        ("versions", versions),
    ]


def _config(folder: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return "\n".join(
            map(redacted, (folder / "config.yaml").read_text(encoding="utf-8").splitlines())
        )
    return ""
