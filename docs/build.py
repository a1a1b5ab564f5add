"""`python docs/build.py [FOLDER]`: the site, built strictly into build/site; a page, a link or a
docstring that fails is an error.

Prints how many pages and links there are and how long it took. Nothing is read from a network.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from pathlib import Path

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent


def main(folder: Path) -> None:
    """Build into `folder` and say what stands there."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    began = time.perf_counter()
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    seconds = time.perf_counter() - began
    pages = list(folder.rglob("*.html"))
    links = sum(len(re.findall(r"<a [^>]*href=", p.read_text(encoding="utf-8"))) for p in pages)
    print(f"{len(pages)} pages, {links} links checked, {seconds:.0f} s: {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site")
    main(parser.parse_args().folder.resolve())
