"""Artefacts and results as tables for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import (
    Console,
    ConsoleOptions,
    Group,
    JustifyMethod,
    RenderableType,
    RenderResult,
)
from rich.table import Table
from rich.text import Text

from ..core.artifacts import peek, read_json
from ..core.errors import ArtifactError, QSearchError
from ..core.metrics import metric_words
from ..core.plan import read_plan
from ..core.units import size_of

_MOST_COLUMNS = 5
_RELIABLE = 0.5  # below it, most of the differences between layers would not be found again


def titled(title: str, table: RenderableType) -> Group:
    """A table below its title, which may be wider than the table."""
    return Group(Text(title, style="table.title"), table)


def results(rows: list[dict[str, Any]]) -> Group:
    """The measured plans side by side, mean ± standard error of every metric: a column a plan, or a
    row a plan where there are many.
    """
    measured = dict.fromkeys(str(m) for row in rows for m in row["metrics"])
    names = sorted(measured, key=lambda name: name != "output_sqnr")  # the output first
    words = [metric_words(name) for name in names if name != "noise"]
    names = [name for name in names if name != "noise"]
    sized = all("bytes" in row for row in rows)
    titles = [
        "plan" if len(rows) > _MOST_COLUMNS else "",
        "stored bits",
        *(["size"] if sized else []),
        *(_with_arrow(word.short, word.arrow) for word in words),
    ]
    lines = [
        titles,
        *(
            [
                row["plan"],
                f"{row['average_bits']:.2f}",
                *([size_of(row["bytes"])] if sized else []),
                *(cell(row, name) for name in names),
            ]
            for row in rows
        ),
    ]
    if len(rows) <= _MOST_COLUMNS:
        lines = [list(line) for line in zip(*lines, strict=True)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, title in enumerate(lines[0]):
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    return titled("measured with common noise", table)


def _with_arrow(words: str, arrow: str) -> str:
    """`SQNR ↑, dB`: the arrow where no line ends before it."""
    name, comma, unit = words.partition(",")
    return f"{name} {arrow}".strip() + comma + unit


def plain(rows: list[dict[str, Any]], title: str) -> Group:
    """Rows of plain data, the keys of the first as columns, numbers with four digits; a paragraph a
    row on a terminal that is too narrow for the columns.
    """
    texts = [
        {
            name: f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, ""))
            for name in rows[0]
        }
        for row in rows
    ]
    words = {name for name, value in rows[0].items() if isinstance(value, str)}
    return titled(title, _Rows(texts, words))


@dataclass(frozen=True)
class _Rows:
    """Rows of texts. `words`: columns that may go on in the next line, between words."""

    rows: Sequence[Mapping[str, str]]
    words: Collection[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        least = {name: self._least(name) for name in self.rows[0]}
        if sum(least.values()) + len(least) > options.max_width:
            for row in self.rows:
                yield Text(", ".join(f"{k} {v}" for k, v in row.items() if v))
            return
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, width in least.items():
            justify: JustifyMethod = "left" if name in self.words else "right"
            table.add_column(name, justify=justify, overflow="fold", min_width=width)
        for row in self.rows:
            table.add_row(*row.values())
        yield table

    def _least(self, name: str) -> int:
        """Characters of the longest word of a column."""
        cells = [name, *(row[name] for row in self.rows)]
        return max(len(word) for cell in cells for word in [*cell.split(), ""])


def listed(rows: list[tuple[str, ...]]) -> Table:
    """Names and what they are, the last column in as many lines as it takes."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for i in range(len(rows[0])):
        table.add_column(no_wrap=i < len(rows[0]) - 1)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def cell(row: dict[str, Any], metric: str) -> str:
    """`mean ± error` of one metric of one plan; `exact` for what full precision is compared with
    itself, `-` where it was not measured.
    """
    if metric_words(metric).unit == "dB" and row["plan"] == "full precision":
        return "exact"
    if metric not in row["metrics"]:
        return "-"
    digits = metric_words(metric).digits
    mean, error = row["metrics"][metric]
    # a narrow column breaks at the spaces, not inside a number
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def show(path: Path, device: str | None = None) -> list[Group | Table | str]:
    """An artefact as tables, chosen by the schema in its header; a graph also timed on a `device`.
    Raises `QSearchError` for a file that is none.
    """
    if path.is_dir():
        raise QSearchError(
            f"show takes a file of a run; in {path} there are "
            f"{', '.join(sorted(p.name for p in path.iterdir() if p.is_file())) or 'none'}"
        )
    kind = "qsearch.trials" if path.suffix == ".db" else peek(path).split("/")[0]
    if device is not None and kind != "qsearch.graph":
        raise QSearchError(f"a device times a graph.json; {path} is a {kind}")
    if kind == "qsearch.trials":
        return [_trials(path)]
    if kind == "qsearch.graph":
        return _graph(path, device)
    shown = {
        "qsearch.plan": _plan,
        "qsearch.stepplan": _plan,
        "qsearch.latency": _latency,
        "qsearch.sensitivity": _sensitivity,
        "qsearch.attribution": _attribution,
        "qsearch.results": _results,
    }
    if kind not in shown:
        raise QSearchError(f"{path} is a {kind}; show reads qsearch.graph, {', '.join(shown)}")
    try:
        return shown[kind](path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a whole {kind} file ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); make it again"
        ) from error


def _graph(path: Path, device: str | None) -> list[Group | Table | str]:
    from ..core.graph import OpGraph

    graph = OpGraph.load(path)
    table = Table()
    for title in ("role", "layers", "weights", "share", "MACs a call", "share", "sees"):
        table.add_column(
            title, justify="left" if title in ("role", "sees") else "right", overflow="fold"
        )
    roles: dict[str, list[Any]] = {}
    for layer in graph:
        roles.setdefault(layer.role, []).append(layer)
    for role, layers in sorted(roles.items(), key=lambda item: -sum(x.weights for x in item[1])):
        weights, macs = sum(x.weights for x in layers), sum(x.macs for x in layers)
        seen = ", ".join(sorted({x.sees for x in layers} - {""}))
        table.add_row(
            role,
            str(len(layers)),
            f"{weights:,}",
            f"{weights / graph.weights:.1%}",
            f"{macs:,}",
            f"{macs / max(1, graph.macs):.1%}",
            seen,
        )
    table.add_row(
        "all",
        str(len(graph.layers)),
        f"{graph.weights:,}",
        "",
        f"{graph.macs:,}",
        "",
        "",
        style="bold",
    )
    title = f"{graph.model}: graph {graph.id}, read by {graph.source}"
    roofline = [_roofline(graph, device)] if device else []
    return [titled(title, table), *_costs(graph), *roofline]


def _costs(graph: Any) -> list[Group | Table | str]:
    """One line of costs in full precision, and the kinds of operation and block."""
    from collections import Counter

    from ..graphs.costs import costs

    if not graph.ops:
        return []
    whole = costs(graph)
    line = (
        f"{whole.bytes / 1e9:.3g} GB of weights at 16 bits; {whole.macs / 1e9:,.0f} G "
        "multiply-accumulates a call, attention included; "
    )
    line += (
        f"{whole.activations / 1e6:,.0f} M activations written; {whole.moved / 1e9:,.3g} GB moved, "
        f"{whole.intensity:.0f} operations a byte"
    )
    blocks, ops = Counter(b.kind for b in graph.blocks), Counter(op.kind for op in graph.ops)
    counted = [("blocks", blocks), ("operations", ops)]
    return [
        line,
        *(
            (
                f"{sum(found.values())} {what}: "
                f"{', '.join(f'{n} {kind}' for kind, n in found.most_common())}"
            )
            for what, found in counted
            if found
        ),
    ]


def _roofline(graph: Any, name: str) -> Group:
    from ..graphs import costs

    on = costs.device(name)
    timed = costs.timings(graph, on)
    total = sum(t.seconds for t in timed)
    units = ", ".join(sorted({t.unit for t in timed}))
    title = (
        f"at best on {on.title}: {1e3 * total:.3g} ms a call in {units}, one operation after the "
        "other, no fusion"
    )
    table = Table()
    for column in (
        "operations",
        "count",
        "MACs",
        "GB moved",
        "ms",
        "share",
        "of it waiting for memory",
    ):
        table.add_column(column, justify="left" if column == "operations" else "right")
    for share in costs.shares(timed):
        waiting = f"{share.bound_by_memory / share.seconds:.0%}" if share.seconds else "-"
        row = (
            f"{share.macs:,}",
            f"{share.moved / 1e9:.3f}",
            f"{1e3 * share.seconds:.3f}",
            f"{share.seconds / total:.1%}",
            waiting,
        )
        table.add_row(share.kind, str(share.count), *row)
    return titled(title, table)


def _plan(path: Path) -> list[Group | Table | str]:
    content, steps, choices = read_plan(path)
    copies = "; every copy counted" if len(steps) > 1 else ""
    table = Table()
    table.add_column("site", overflow="fold")
    ends = [0.0, *steps.bounds, 1.0]
    names = [f"steps {a:.0%} to {b:.0%}" for a, b in itertools.pairwise(ends)]
    for name in names if len(steps) > 1 else ["scheme"]:
        table.add_column(name, overflow="fold")
    for site, held in choices.items():
        texts = [held] if isinstance(held, str) else held
        table.add_row(site, *(texts if len(texts) == len(steps) else texts * len(steps)))
    return [titled(_achieved(content) + copies, table)]


def _achieved(content: dict[str, Any]) -> str:
    """Size, time where it was limited, and what the solver said."""
    achieved, solver = content["achieved"], content["solver"]
    line = f"{achieved['average_bits']:.3f} stored bits a weight, {achieved['bytes']:,} bytes"
    if achieved.get("attention_share", 1.0) < 1:
        line += f", {achieved['attention_share']:.1%} of the FLOPs of dense attentions"
    line += (
        f", {1e3 * achieved['latency']:.4g} ms a call"
        if achieved.get("latency") is not None
        else ""
    )
    line += f"; {solver['name']}: {solver['status']}"
    return line + (f", at most {solver['gap']:.2%} above the best" if solver["gap"] else "")


def _latency(path: Path) -> list[Group | Table | str]:
    _, content = read_json(path, "qsearch.latency/1")
    schemes = sorted({s for row in content["seconds"].values() for s in row})
    title = (
        f"milliseconds of a call on {content['device']}; {1e3 * content['rest']:.4g} ms that no "
        "scheme changes"
    )
    table = Table()
    table.add_column("layer", overflow="fold")
    for scheme in schemes:
        table.add_column(scheme, justify="right", overflow="fold")
    for name, row in content["seconds"].items():
        table.add_row(name, *(f"{1e3 * row[s]:.3g}" if s in row else "-" for s in schemes))
    return [titled(title, table)]


def _sensitivity(path: Path) -> list[Group | Table | str]:
    from ..core.table import SensitivityTable

    whole = SensitivityTable.load(path)
    shown: list[Group | Table | str] = []
    for metric in whole.metrics:
        rows = whole.frame[whole.frame["metric"] == metric]
        wide, floors = (
            rows.pivot_table(index="site", columns="scheme", values=v, sort=False)
            for v in ("estimate", "floor")
        )
        title = (
            f"{metric} of graph {whole.graph}, mean over {rows['step'].nunique()} step bins (a "
            "squared error over its scale; ~ within 3 dB of the floor)"
        )
        table = Table()
        table.add_column("layer", overflow="fold")
        for scheme in wide.columns:
            table.add_column(str(scheme), justify="right", overflow="fold")
        for (site, values), (_, floor) in zip(wide.iterrows(), floors.iterrows(), strict=True):
            marks = ("~" if v < 2 * f else "" for v, f in zip(values, floor, strict=True))
            table.add_row(
                str(site), *(f"{mark}{v:.2e}" for mark, v in zip(marks, values, strict=True))
            )
        line = f"reliability of the ranking by {metric}: {whole.reliability(metric):.2f}"
        shown += [
            titled(title, table),
            line
            if whole.reliability(metric) >= _RELIABLE
            else f"{line}: it is mostly noise, take more probes or samples",
        ]
    return shown


def _attribution(path: Path) -> list[Group | Table | str]:
    from ..core.attribution import Attribution
    from .explained import attribution_tables

    return [*attribution_tables(Attribution.load(path))]


def _results(path: Path) -> list[Group | Table | str]:
    return [results(read_json(path, "qsearch.results/1")[1]["rows"])]


def _trials(path: Path) -> Group:
    from ..core.graph import OpGraph
    from ..core.trials import Trials

    graph = OpGraph.load(path.with_name("graph.json"))
    if not path.exists():
        raise QSearchError(f"{path} does not exist; make it with `qsearch evaluate`")
    rows = [
        {"plan": t.name, "average_bits": t.average_bits, "metrics": t.metrics}
        for t in Trials(path, graph).all()
    ]
    return results(rows)
