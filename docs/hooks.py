"""What MkDocs asks of us: the pages made from code, notebooks and numbers, and formulas as MathML.

`docs/site_pages/` holds one module a family of pages, each with `pages(root)`: path -> Markdown
(or the bytes of a picture). Whatever they miss (a JSON without its script, a notebook whose outputs
are older than its code) raises `MissingError`, which ends the build with its name.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from site_pages import (  # they lie beside this file, which is no package
    claims,
    commands,
    config,
    files,
    maths,
    messages,
    methods,
    notebooks,
    project,
    python_api,
    results,
    schemes,
    tables,
)
from site_pages.missing import MissingError

ROOT = Path(__file__).parent.parent
#: a word of the navigation in mkdocs.yml -> the module that makes its pages, in their order
SECTIONS = {
    "NOTEBOOKS": notebooks,
    "MESSAGES": messages,
    "METHODS": methods,
    "RESULTS": results,
    "PYTHON": python_api,
}
OTHERS = (claims, commands, config, schemes, files, project)
_made: dict[str, str | bytes] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages, and put those whose number is not known beforehand into the navigation."""
    _made.clear()
    try:
        for module in (*SECTIONS.values(), *OTHERS):
            _made.update(module.pages(ROOT))
    except MissingError as error:
        raise PluginError(str(error)) from error
    config.nav = _filled(config.nav or [])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that were made."""
    for path, content in _made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in the tables and values that a page asks for in its comments."""
    if page.file.src_path.startswith("project/"):
        return markdown  # they explain these comments
    try:
        return tables.filled(markdown, ROOT, page.file.src_path)
    except MissingError as error:
        raise PluginError(f"{page.file.src_path}: {error}") from error


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves."""
    try:
        return maths.as_mathml(html)
    except MissingError as error:
        raise PluginError(f"{page.file.src_path}: {error}") from error


def _filled(entries: list[Any]) -> list[Any]:
    """The navigation with pages in place of the words in capitals."""
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            [(title, below)] = entry.items()
            if isinstance(below, list):
                found.append({title: _filled(below)})
                continue
            if re.fullmatch("[A-Z]+", below):
                paths = _paths(below)
                found.append({title: paths[0] if len(paths) == 1 else paths})
                continue
        found.append(entry)
    return found


def _paths(word: str) -> list[Any]:
    if word == "TOOLS":
        folder = ROOT / "docs" / "how-to" / "tools"
        return [f"how-to/tools/{p.name}" for p in sorted(folder.glob("*.md"))]
    return SECTIONS[word].navigation(ROOT)
