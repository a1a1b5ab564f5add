"""Lines of code of each package, and how many files name one kind of choice.

    python notebooks/figures/rooms.py [--before 97b68e4]

Lines of Python by room, at an earlier commit and now, and the files that know the word `shift`
(TaQ-DiT's transform) in code: a kind of choice is its own file, its test and its page. Reads git
alone. Writes rooms.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from pathlib import Path

from figure import publish

ROOT = Path(__file__).resolve().parents[2]
_WORD = re.compile(r"\bshift(?![_a-z]*\(\))\b|~shift")


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def sources(commit: str) -> dict[str, str]:
    """Path -> text of every Python file of a commit."""
    listed = git("ls-tree", "-r", "--name-only", commit).splitlines()
    wanted = [p for p in listed if p.endswith(".py") and p.split("/")[0] in ROOMS]
    return {path: git("show", f"{commit}:{path}") for path in wanted}


ROOMS = ("qsearch", "kernels", "tests", "notebooks", "docs")


def room(path: str) -> str:
    """qsearch/decide, or the top folder."""
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "qsearch" and len(parts) > 2 else parts[0]


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", default="97b68e4")
    asked = parser.parse_args()
    counts: list[Counter[str]] = []
    words: list[list[str]] = []
    for commit in (asked.before, "HEAD"):
        held = sources(commit)
        lines: Counter[str] = Counter()
        for path, text in held.items():
            lines[room(path)] += text.count("\n")
        counts.append(lines)
        ours = [p for p in held if p.startswith("qsearch/")]
        words.append([p for p in ours if _WORD.search(held[p])])
    before, now = counts
    rows = [
        {"room": name, "lines before": before[name], "lines now": now[name]}
        for name in sorted({*before, *now})
    ]
    total = {"room": "all", "lines before": before.total(), "lines now": now.total()}
    shift = {"room": "files that know the word shift", "lines before": len(words[0])}
    rows += [total, {**shift, "lines now": len(words[1])}]
    extra = {"shift before": words[0], "shift now": words[1]}
    title = f"Lines of Python by room, {asked.before} and now"
    publish(__file__, rows, title=title, seed=0, extra=extra)


if __name__ == "__main__":
    main()
