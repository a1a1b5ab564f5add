"""The measured numbers: notebooks/figures/NAME.json, each with the script that made it, its
command, machine and date.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .missing import MissingError

FOLDER = Path("notebooks") / "figures"


@dataclass(frozen=True)
class Figure:
    """One JSON of measured numbers.

    Attributes:
        name: the file's stem.
        script: stem of the script that wrote it: the longest that the name begins with.
        content: what it holds; `rows` is its table.
        date: when it was measured, or committed where the file does not say.
    """

    name: str
    script: str
    content: dict[str, Any]
    date: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table."""
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def source(self) -> str:
        """Where the numbers come from, as a line of Markdown: command, machine, date, versions."""
        held = self.content
        versions = ", ".join(
            f"{name} {held['versions'][name]}"
            for name in ("torch", "diffusers")
            if name in held.get("versions", {})
        )
        command = str(held["command"]).replace("|", "\\|")
        return f"`{command}` · {held['machine']} · seed {held['seed']} · {versions} · {self.date}"


@functools.cache
def figures(root: Path) -> dict[str, Figure]:
    """Every JSON in notebooks/figures by its name.

    Raises `MissingError` for a JSON that no script made, and for one without command or machine.
    """
    folder = root / FOLDER
    scripts = sorted((p.stem for p in folder.glob("*.py")), key=len, reverse=True)
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".partial.json"):
            continue
        script = next((s for s in scripts if path.stem == s or path.stem.startswith(f"{s}-")), None)
        if script is None:
            raise MissingError(f"no script in {FOLDER} is named like {path.name}")
        content = json.loads(path.read_text(encoding="utf-8"))
        lacking = [
            k
            for k in ("command", "machine", "seed", "rows")
            if not content.get(k, 1) and k != "seed"
        ]
        lacking += [k for k in ("command", "machine", "seed", "rows") if k not in content]
        if lacking:
            raise MissingError(f"{FOLDER / path.name} does not say its {', '.join(lacking)}")
        found[path.stem] = Figure(path.stem, script, content, content.get("date") or _date(path))
    return found


def figure(root: Path, name: str) -> Figure:
    """One of `figures`. Raises `MissingError` where there is none of that name."""
    known = figures(root)
    if name not in known:
        raise MissingError(f"there is no {FOLDER / name}.json; there are {', '.join(known)}")
    return known[name]


def figures_of(root: Path, name: str) -> list[Figure]:
    """The one of that name; with `*` in it, those whose names match. Raises `MissingError` where
    there is none.
    """
    if "*" not in name:
        return [figure(root, name)]
    found = [held for known, held in figures(root).items() if fnmatch.fnmatchcase(known, name)]
    if not found:
        raise MissingError(f"there is no {FOLDER / name}.json")
    return found


def docstring(root: Path, script: str) -> tuple[str, str]:
    """First line of a script's docstring, and the rest of it."""
    tree = ast.parse((root / FOLDER / f"{script}.py").read_text(encoding="utf-8"))
    first, _, rest = (ast.get_docstring(tree) or script).partition("\n\n")
    return " ".join(first.split()), rest


def _date(path: Path) -> str:
    """When a file was last committed; "date not known" outside a clone."""
    done = subprocess.run(
        ["git", "log", "-1", "--format=%cs", "--", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "date not known"
