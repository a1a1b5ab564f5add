"""The reference of the Python interface: `qsearch`'s public names by folder, and what plug-ins
use.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

#: page -> (title, first words, packages whose public names stand on it)
ROOMS = {
    "nouns": ("Nouns", "What verbs read and write; each has a file of its own.", ("core",)),
    "extract": ("Extract", "A model as a graph.", ("graphs",)),
    "measure": (
        "Measure",
        "What every choice costs, and what a plan does to pictures.",
        ("measure",),
    ),
    "plan": ("Plan", "Plans under budgets.", ("decide",)),
    "learn": ("Learn", "What predicts plans that were not measured, and why.", ("learn",)),
    "execute": ("Execute", "The plan at work, and as other tools' files.", ("execute", "stages")),
}
#: page -> (title, first words, modules shown whole)
MODULES = {
    "pipelines": (
        "Pipelines",
        "A diffusers pipeline, its denoiser's own calls, and the trained models that ship.",
        ("qsearch.measure.pipelines", "qsearch.zoo", "qsearch.diffusers"),
    ),
    "plug-ins": (
        "Plug-ins",
        (
            "What plug-ins are given and what they give back; see [how to add "
            "one](../../how-to/plug-ins.md)."
        ),
        (
            "qsearch.choices.transform",
            "qsearch.execute.exporting",
            "qsearch.core.words",
            "qsearch.core.attention_words",
            "qsearch.decide.problem",
        ),
    ),
    "contracts": (
        "Contracts",
        "Tests that every plug-in must pass; subclass them for your own.",
        ("qsearch.testing",),
    ),
}


def pages(root: Path) -> dict[str, str | bytes]:
    """A page a room."""
    contents = _contents(root)
    made: dict[str, str | bytes] = {}
    rows = []
    for page, (title, words, packages) in ROOMS.items():
        names = [n for n, module in contents.items() if module.partition(".")[0] in packages]
        parts = [f"# {title}\n", f"{words}\n"]
        parts += [f"::: qsearch.{contents[name]}.{name}\n" for name in names]
        made[f"reference/python/{page}.md"] = "\n".join(parts)
        rows.append(f"- [{title}]({page}.md): {words} " + ", ".join(f"`{n}`" for n in names))
    for page, (title, words, modules) in MODULES.items():
        parts = [f"# {title}\n", f"{words}\n"] + [f"::: {module}\n" for module in modules]
        made[f"reference/python/{page}.md"] = "\n".join(parts)
        rows.append(f"- [{title}]({page}.md): {words.replace('../../', '../../')}")
    made["reference/python/index.md"] = (
        "# Python\n\nThe public names of `qsearch`. `import qsearch` is instant: what a "
        "name needs is "
        "loaded when the name is used.\n\n" + "\n".join(rows) + "\n"
    )
    return made


def shown(root: Path) -> dict[str, list[str]]:
    """Modules whose names the reference shows -> those names; none: all of the module's."""
    held: dict[str, list[str]] = {}
    for name, module in _contents(root).items():
        held.setdefault(f"qsearch.{module}", []).append(name)
    return held | {module: [] for _, _, modules in MODULES.values() for module in modules}


def navigation(root: Path) -> list[Any]:
    """The index, then the rooms."""
    return [f"reference/python/{page}.md" for page in ("index", *ROOMS, *MODULES)]


def _contents(root: Path) -> dict[str, str]:
    """Public name -> module, as `qsearch/__init__.py` says."""
    tree = ast.parse((root / "qsearch" / "__init__.py").read_text(encoding="utf-8"))
    found = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_CONTENTS"
    )
    contents: dict[str, str] = ast.literal_eval(found)
    return contents
