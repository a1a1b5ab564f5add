"""Pages about the project, from the files at its root: where GitHub and packagers look for them."""

from __future__ import annotations

import re
from pathlib import Path

#: page -> file
FILES = {
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
    "project/security.md": "SECURITY.md",
    "project/release.md": "RELEASING.md",
    "project/log.md": "notebooks/LOG.md",
}


def pages(root: Path) -> dict[str, str | bytes]:
    """The files, with links between them and into the docs that hold on the site."""
    return {
        page: _linked((root / name).read_text(encoding="utf-8"), name)
        for page, name in FILES.items()
    }


def _linked(text: str, name: str) -> str:
    """Links of a file at the root as links of a page in project/; those to code become plain
    words.
    """
    pages = {file: page.rpartition("/")[2] for page, file in FILES.items()}

    def link(found: re.Match[str]) -> str:
        words, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path = target if name.count("/") == 0 else f"{name.rpartition('/')[0]}/{target}"
        path, _, anchor = path.partition("#")
        anchor = f"#{anchor}" if anchor else ""
        if path in pages:
            return f"[{words}]({pages[path]}{anchor})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{words}](../{path.removeprefix('docs/')}{anchor})"
        return words if words.startswith("`") else f"{words} (`{path}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)
