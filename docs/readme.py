"""`python docs/readme.py`: puts the tables of the README and the numbers in the sentences of
`docs/` in again, from measured numbers and shapes; tests hold them to that.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from site_pages.costs import costs  # beside this file
from site_pages.markdown import table
from site_pages.tables import rows_of, with_values

_COLUMNS = (
    "model; plan; stored bits; output_sqnr as output SQNR, dB; sqnr as final latent SQNR, dB; ssim "
    "as SSIM; alignment"
)
_BLOCK = re.compile(r"(<!-- made by docs/readme.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results() -> str:
    """What plans at 4 bits measure on the zoo."""
    rows = [
        r for r in rows_of(ROOT, "main_job", {"columns": _COLUMNS}) if r["plan"] != "full precision"
    ]
    return table(rows)


def page(text: str) -> str:
    """The README with its tables put in."""
    made = {"results": results, "costs": lambda: costs(ROOT)}
    return _BLOCK.sub(lambda found: found[1] + made[found[2]]() + found[3], text)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (made := with_values(text, ROOT)) != text:
            path.write_text(made, encoding="utf-8")
