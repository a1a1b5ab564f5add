"""The fenced blocks of README and docs, with what stands before them: which of them run in the
tests, and why others do not.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: pages that are written by hand, README first
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Attributes:
        page: path from the root.
        line: where its fence stands.
        language: as the fence says.
        text: what it holds.
        reason: why it is not run; "" where it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str

    def commands(self) -> list[list[str]]:
        """The words of every line of a shell block that calls qsearch, comments apart."""
        if self.language != "bash":
            return []
        joined = self.text.replace("\\\n", " ")
        lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
        found = []
        for words in lines:
            for at, word in enumerate(words):
                if Path(word).name == "qsearch":
                    found.append(["qsearch", *words[at + 1 :]])
        return found


def snippets(*languages: str) -> list[Snippet]:
    """All blocks in these languages."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for block in _BLOCK.finditer(text):
            if block["language"] in languages:
                line = text[: block.start()].count("\n") + 1
                page = path.relative_to(ROOT).as_posix()
                found.append(
                    Snippet(page, line, block["language"], block["text"], block["reason"] or "")
                )
    return found


def by_page() -> dict[str, list[Snippet]]:
    """Blocks of shell and Python that run, page by page in their order."""
    held: dict[str, list[Snippet]] = {}
    for snippet in snippets("bash", "python"):
        if not snippet.reason:
            held.setdefault(snippet.page, []).append(snippet)
    return held
