"""protocol: a published way of measuring, laid over a run's config, and its results as tables for a
paper.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..core.artifacts import write_text
from ..core.errors import QSearchError
from ..core.metrics import metric_words
from ..core.settings import Settings

if TYPE_CHECKING:
    from .folder import Run


class ProtocolSettings(Settings):
    """A protocol of `qsearch list protocols`, and the published file of its prompts."""

    name: str
    prompts: Path | None = Field(None, description="the published file, checked by its hash")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


def with_protocol(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A config's content with what its protocol fixes.

    Args:
        content: sections as they were read.
        source: where, for errors.

    Returns:
        The content with sampler, metrics, number of samples and gates of the protocol.

    Raises:
        QSearchError: the config says otherwise than its protocol, which would make the number
            another one.
    """
    from ..measure.protocols import read_protocol

    found = dict(content)
    asked = found.get("protocol")
    name = asked.get("name") if isinstance(asked, Mapping) else asked
    if not isinstance(name, str):
        return found
    card = read_protocol(name)
    fixed: dict[str, dict[str, Any]] = {
        "sampling": card.sampling,
        "evaluate": {"samples": card.samples, "metrics": list(card.metrics)},
    }
    for section, values in fixed.items():
        given = found.get(section)
        held = dict(given) if isinstance(given, Mapping) else {}
        for key, value in values.items():
            said = held.get(key)
            if said is not None and (list(said) if isinstance(said, tuple) else said) != value:
                raise QSearchError(
                    f"{source}: protocol {name} fixes {section}.{key} at {value}; given {said}: "
                    f"leave out {section}.{key}, or the protocol"
                )
            held[key] = value
        found[section] = held
    gates = found.get("gates")
    found["gates"] = {**card.gates, **(gates if isinstance(gates, Mapping) else {})}
    return found


def write_tables(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Results as papers print them: results.md, results.csv and results.tex.

    Args:
        run: the run.
        rows: results as in results.json.

    Returns:
        The files.
    """
    head, body = _table(run, rows)
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(row)} |" for row in body]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *body])
    escaped = [[_latex(word) for word in row] for row in (head, *body)]
    tex = [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(escaped[0]) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in escaped[1:]),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    made = {"results.md": "\n".join(lines) + "\n", "results.csv": text.getvalue()}
    made["results.tex"] = "\n".join(tex) + "\n"
    for name, content in made.items():
        write_text(run.path(name), content)
    return [run.path(name) for name in made]


def _table(run: Run, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    metrics = [m for m in run.metrics if any(m in row["metrics"] for row in rows)]
    words = {m: metric_words(m) for m in metrics}
    head = ["plan", "bits", "MB", *(f"{words[m].short} {words[m].arrow}" for m in metrics)]
    body = []
    for row in rows:
        values = [
            f"{row['metrics'][m][0]:.{words[m].digits}f}" if m in row["metrics"] else ""
            for m in metrics
        ]
        size = f"{row['bytes'] / 1e6:.1f}"
        body.append([str(row["plan"]), f"{row['average_bits']:.2f}", size, *values])
    return head, body


def _latex(word: str) -> str:
    for mark in "&%_#":
        word = word.replace(mark, "\\" + mark)
    return word.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")
