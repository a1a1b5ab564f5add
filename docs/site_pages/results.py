"""The results: a page for each script in notebooks/figures, with every table and picture that it
made.

Nothing on these pages is typed: captions are the scripts' docstrings, numbers are their JSONs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .figures import FOLDER, Figure, docstring, figures
from .markdown import code, table

#: heading -> scripts whose results stand below it; the others go to the last
TOPICS = {
    "The main job": (
        "main_job",
        "main_job_pairs",
        "zoo",
        "zoo_video",
        "shell",
        "graphs",
        "first_contact",
        "interrupts",
    ),
    "Sensitivity": ("probes", "memory", "sizes", "noise_by_hand", "quick"),
    "Metrics": ("metrics",),
    "Plans": (
        "plans",
        "arena",
        "methods",
        "ranges",
        "step_log",
        "whole_pipeline",
        "gates",
        "video",
        "cluster",
    ),
    "Surrogates and explanations": ("surrogates", "explanations", "measured_plans"),
    "Formats and codes": (
        "formats",
        "codes_limit",
        "codes_layers",
        "codes_speed",
        "codes_plans",
        "rounding",
        "reconstruction",
        "post_gelu",
    ),
    "Speed and memory": ("products", "runtime", "denoisers", "compiled"),
    "Attention": ("sparse_attention", "attention_plans"),
    "Export": ("tools", "comfyui_formats", "original_names", "lora"),
    "Models": ("census",),
    "Multistage flow": ("ecar", "ecar_plans"),
    "Code": ("rooms",),
    "More": (),
}
_LONG = 40


def pages(root: Path) -> dict[str, str | bytes]:
    """A page a script, and one that lists them."""
    held = _by_script(root)
    made: dict[str, str | bytes] = {
        f"results/{script}.md": _page(root, script, found) for script, found in held.items()
    }
    for picture in sorted((root / FOLDER).glob("*.png")):
        made[f"results/{picture.name}"] = picture.read_bytes()
    made["results/index.md"] = _index(root, held)
    return made


def navigation(root: Path) -> list[Any]:
    """The pages by topic."""
    held = _by_script(root)
    return ["results/index.md"] + [
        {topic: [f"results/{s}.md" for s in scripts]} for topic, scripts in _topics(held).items()
    ]


def _by_script(root: Path) -> dict[str, list[Figure]]:
    held: dict[str, list[Figure]] = {}
    for one in figures(root).values():
        held.setdefault(one.script, []).append(one)
    return held


def _topics(held: dict[str, list[Figure]]) -> dict[str, list[str]]:
    placed = {s for scripts in TOPICS.values() for s in scripts}
    found = {topic: [s for s in scripts if s in held] for topic, scripts in TOPICS.items()}
    found["More"] = [s for s in held if s not in placed]
    return {topic: scripts for topic, scripts in found.items() if scripts}


def _index(root: Path, held: dict[str, list[Figure]]) -> str:
    parts = [
        "# Results\n",
        "Every table and picture that this project states, made from the files that the scripts in "
        "`notebooks/figures/` wrote: with the command that measures it again, the machine and the "
        "date. The [log](../project/log.md) says what each was asked for, and what failed.\n",
    ]
    for topic, scripts in _topics(held).items():
        rows = [
            {
                "page": f"[{s}]({s}.md)",
                "question": docstring(root, s)[0],
                "last": max(f.date for f in held[s]),
            }
            for s in scripts
        ]
        parts.append(f"## {topic}\n\n{table(rows)}")
    return "\n".join(parts)


def _page(root: Path, script: str, held: list[Figure]) -> str:
    first, rest = docstring(root, script)
    parts = [f"# {script}\n", f"{first}\n", rest + "\n" if rest else ""]
    pictures = [p for p in sorted((root / FOLDER).glob("*.png")) if _belongs(p.stem, script)]
    parts += [f"![{script}: {p.stem}]({p.name})\n" for p in pictures]
    parts += [_section(one) for one in held]
    return "\n".join(parts)


def _belongs(stem: str, script: str) -> bool:
    return stem == script or stem.startswith(f"{script}-")


def _section(one: Figure) -> str:
    parts = [f"## {one.name} {{#{one.name}}}\n", _folded(one.name, one.rows)]
    standard = {"command", "seed", "machine", "versions", "rows", "date"}
    for key, value in one.content.items():
        if key in standard:
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(f"### {key}\n\n{_folded(key, value)}")
        elif not isinstance(value, (list, dict)):
            parts.append(
                f"{key}: {value:.4g}\n" if isinstance(value, float) else f"{key}: {value}\n"
            )
        elif isinstance(value, dict) and all(
            not isinstance(v, (list, dict)) for v in value.values()
        ):
            parts.append(f"### {key}\n\n{table([{'of': k, 'value': v} for k, v in value.items()])}")
    versions = ", ".join(f"{k} {v}" for k, v in one.content.get("versions", {}).items())
    parts.append(
        f"{code(str(one.content['command']), 'bash')}\n{one.content['machine']} · seed "
        f"{one.content['seed']} · {one.date} · {versions}\n"
    )
    return "\n".join(parts)


def _folded(title: str, rows: list[dict[str, Any]]) -> str:
    """A table; a long one is folded."""
    made = table(rows)
    if len(rows) <= _LONG:
        return made
    indented = "\n".join(f"    {line}".rstrip() for line in made.splitlines())
    return f'??? note "{len(rows)} rows"\n\n{indented}\n'
