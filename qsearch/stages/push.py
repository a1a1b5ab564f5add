"""push: an export as a repository of the Hugging Face hub, with a model card made from the run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..core.artifacts import write_text
from ..core.errors import QSearchError, first_line
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.settings import Settings
from .evaluate import FULL_PRECISION, OWN, results_of

if TYPE_CHECKING:
    from .folder import Run

CARD = "README.md"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PICTURE = "contact_sheet.png"
#: layers that a card lists, the most sensitive first
_LISTED = 12


class PushSettings(Settings):
    """Where an export goes."""

    repository: str = Field(description="OWNER/NAME on the hub")
    private: bool = Field(False, description="whether only its owner sees it")
    dry_run: bool = Field(False, description="write the card, and say what would be sent")


def check_push(run: Run, settings: PushSettings) -> None:
    """What a push needs, before anything is exported.

    Args:
        run: the run; its plan must have been measured, and the table that it was made from be
            there.
        settings: where to.

    Raises:
        QSearchError: the name is none of a repository, the run's plan was not evaluated, there is
            no token, or the repository exists.
    """
    if not _NAME.fullmatch(settings.repository):
        raise QSearchError(
            f"a repository is OWNER/NAME, such as someone/sdxl-4bit; given {settings.repository!r}"
        )
    graph = run.graph()
    try:
        results_of(run, graph, Plan.load(run.path("plan.json"), graph))
    except QSearchError as error:
        raise QSearchError(f"a model card shows what was measured: {error}") from None
    if not run.config.allocate.layers and not run.tables(graph):
        raise QSearchError(
            f"a model card says why each layer got what it got, and {run.folder} has no table of "
            f"sensitivities: `qsearch profile {run.folder}` first"
        )
    if settings.dry_run:
        return
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not get_token():
        raise QSearchError(
            "the hub asks for a token: `hf auth login`, or HF_TOKEN; --dry-run writes "
            "the card without"
        )
    try:
        exists = HfApi().repo_exists(settings.repository)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise QSearchError(f"the hub does not answer: {first_line(error)}") from error
    if exists:
        raise QSearchError(
            f"{settings.repository} exists, and nothing is written over it; choose another name"
        )


def push(run: Run, tool: str, folder: Path, settings: PushSettings) -> str:
    """Write the card into an export and send the folder.

    Args:
        run: the run.
        tool: the exporter.
        folder: its export.
        settings: where to.

    Returns:
        The address of the repository; of a dry run the path of the card.

    Raises:
        QSearchError: as `check_push`, and where the hub refuses.
    """
    check_push(run, settings)
    if run.path(_PICTURE).is_file():
        shutil.copyfile(run.path(_PICTURE), folder / _PICTURE)
    write_text(folder / CARD, card(run, tool, folder, settings.repository))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    size = sum(p.stat().st_size for p in files) / 1e6
    if settings.dry_run:
        run.progress.say(
            f"push: would send {len(files)} files of {size:.1f} MB to {settings.repository}"
        )
        return str(folder / CARD)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(settings.repository, private=settings.private, exist_ok=False)
        api.upload_folder(repo_id=settings.repository, folder_path=str(folder))
    except (HfHubHTTPError, OSError) as error:
        raise QSearchError(f"the hub refused: {first_line(error)}") from error
    run.progress.say(f"push: {len(files)} files of {size:.1f} MB are in {settings.repository}")
    return settings.repository


def card(run: Run, tool: str, folder: Path, repository: str) -> str:
    """A model card in Markdown, made from the run alone.

    Args:
        run: the run, evaluated.
        tool: the exporter.
        folder: its export.
        repository: where it will lie.

    Returns:
        Text with the hub's front matter: what was asked, what came out, which layers are kept and
        why, how to load it, hashes.
    """
    graph = run.graph()
    plan = Plan.load(run.path("plan.json"), graph)
    rows = results_of(run, graph, plan)
    budget = plan.budget.limits if plan.budget is not None else {}
    base = [f"base_model: {run.config.model}", "base_model_relation: quantized"]
    tags = ["library_name: diffusers", "tags: [quantization, mixed-precision, qsearch]"]
    head = ["---", *(base if _NAME.fullmatch(run.config.model) else []), *tags, "---"]
    asked = ", ".join(f"{k.replace('_', ' ')} at most {v:g}" for k, v in budget.items())
    parts = [
        "\n".join(head),
        f"# {repository.partition('/')[2]}",
        _about(run, plan, tool, folder, asked or "by hand"),
        _results(run, rows),
    ]
    if run.path(_PICTURE).is_file():
        parts.append(f"![full precision and the plan, same noise]({_PICTURE})")
    parts += [_layers(run, plan), _loading(run, tool, repository), _files(folder)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(run: Run, plan: Plan, tool: str, folder: Path, asked: str) -> str:
    """What this is, and what the tool's own formats changed of what was measured."""
    from ..core import plugins
    from ..execute.exporting import formats

    written = plugins.load("exporters", tool).read(folder, run.graph())
    wanted = formats(plan.single)
    rounded = [name for name, scheme in written.items() if wanted.get(name, scheme) != scheme]
    kinds = len({str(scheme) for scheme in written.values()})
    text = (
        f"{run.model_name}: {len(written)} layers in {kinds} formats, chosen layer by "
        "layer by qsearch "
        f"({asked}); written for {tool}."
    )
    if rounded:
        text += (
            f" {len(rounded)} layers were rounded to the nearest format that {tool} has; what is "
            "measured below is the plan before that."
        )
    return text


def _results(run: Run, rows: list[dict[str, Any]]) -> str:
    metrics = [m for m in run.metrics if any(m in row["metrics"] for row in rows)]
    words = [metric_words(m) for m in metrics]
    lines = [
        "## Measured",
        "",
        "Same prompts and noise for all; means with standard errors.",
        "",
        "| | bits a weight | MB | " + " | ".join(f"{w.short} {w.arrow}" for w in words) + " |",
        "|" + " --- |" * (3 + len(metrics)),
    ]
    for row in rows:
        name = {OWN: "**this plan**", FULL_PRECISION: "16 bits"}.get(row["plan"], row["plan"])
        cells = [
            f"{row['metrics'][m][0]:.{w.digits}f} ± {row['metrics'][m][1]:.{w.digits}f}"
            if m in row["metrics"]
            else ""
            for m, w in zip(metrics, words, strict=True)
        ]
        size = f"{row['average_bits']:.2f} | {row['bytes'] / 1e6:.1f}"
        lines.append(f"| {name} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _layers(run: Run, plan: Plan) -> str:
    """The most sensitive layers and what they got; nothing without a table."""
    from ..report.tables import reasons

    tables = run.tables(run.graph())
    if not tables:
        return ""
    found = reasons(run.graph(), tables[0], plan, count=_LISTED)
    schemes = list(dict.fromkeys(s for reason in found for s in reason.decibels))
    lines = [
        "## Why these layers",
        "",
        (
            "The most sensitive layers: decibels of the denoiser's output with this layer "
            "alone rounded, and what the plan gave it."
        ),
        "",
        "| layer | role | of the weights | " + " | ".join(f"`{s}`" for s in schemes) + " | plan |",
        "|" + " --- |" * (4 + len(schemes)),
    ]
    for reason in found:
        values = [reason.decibels.get(s, math.nan) for s in schemes]
        cells = " | ".join("–" if math.isnan(x) else f"{x:.1f}" for x in values)
        lines.append(
            f"| `{reason.layer}` | {reason.role} | {reason.share:.1%} | {cells} | "
            f"`{reason.scheme}` |"
        )
    return "\n".join(lines)


def _loading(run: Run, tool: str, repository: str) -> str:
    """Code of the tool for one denoiser, and where the files go for others."""
    from ..core import plugins
    from ..execute.exporting import loading
    from ..execute.weights import component

    code = ""
    if not run.graph().components:
        config = run.model_folder / component(run.model_folder) / "config.json"
        kind = str(json.loads(config.read_text(encoding="utf-8"))["_class_name"])
        code = loading(plugins.load("exporters", tool), kind, repository)
    parts = ["## Loading", plugins.caption("exporters", tool)]
    if code:
        parts += [f"```python\n{code}\n```", "For files by themselves:"]
    parts.append(
        f"`hf download {repository} --local-dir FOLDER`, then as the page on {tool} of "
        "qsearch's documentation says."
    )
    return "\n\n".join(parts)


def _files(folder: Path) -> str:
    lines = ["## Files", "", "| file | MB | SHA-256 |", "| --- | --- | --- |"]
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CARD):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        lines.append(f"| {name} | {path.stat().st_size / 1e6:.2f} | `{digest}` |")
    return "\n".join(lines)
