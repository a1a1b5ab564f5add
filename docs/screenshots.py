"""`python docs/screenshots.py`: the built site as readers see it, at 1400 and 390 pixels, light and
dark, small, in docs/pictures/.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.browser import screenshot  # the browser of the tests

PAGES = {"start": "index.html", "card": "methods/mixdq.html", "results": "results/arena.html"}
_HEIGHT = 520


def main() -> None:
    """A picture a page: four views side by side."""
    site = ROOT / "build" / "site"
    for name, page in PAGES.items():
        views = []
        for width in (1400, 390):
            for dark in (False, True):
                with tempfile.TemporaryDirectory() as folder:
                    place = Path(folder) / "view.png"
                    screenshot(site, page, place, Path(folder) / "browser", width, dark)
                    view = Image.open(place).convert("RGB")
                    size = (round(view.width * _HEIGHT / view.height), _HEIGHT)
                    views.append(view.resize(size, Image.Resampling.LANCZOS))
        whole = Image.new("RGB", (sum(v.width for v in views) + 6 * len(views), _HEIGHT), "#888")
        left = 0
        for view in views:
            whole.paste(view, (left, 0))
            left += view.width + 6
        target = ROOT / "docs" / "pictures" / f"site-{name}.png"
        target.parent.mkdir(exist_ok=True)
        small = whole.quantize(256, kmeans=3, dither=Image.Dither.NONE)
        small.save(target, optimize=True)
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
