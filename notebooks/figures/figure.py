"""What every figure script shares: a table on the screen, and the same numbers as JSON with
versions, seed and command.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qsearch.core.artifacts import versions


def publish(
    script: str,
    rows: list[dict[str, Any]],
    *,
    title: str,
    seed: int,
    extra: dict[str, Any] | None = None,
) -> None:
    """Print `rows` (the keys of the first are the columns) and write NAME.json beside the script
    NAME.py.
    """
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    path = Path(script).with_suffix(".json")
    content = {
        "command": " ".join(["python", *sys.argv]),
        "seed": seed,
        "machine": machine(),
        "commit": commit(),
        "versions": versions(),
        "rows": rows,
        **(extra or {}),
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def machine() -> str:
    """The processor, the units that products depend on, the threads that torch may take, and the
    GPU where there is one.
    """
    found = [processor(), platform.system(), f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found.append(torch.cuda.get_device_name())
    return ", ".join(found)


def processor() -> str:
    """The processor's name with what it multiplies fast, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    held = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = set(held.get("flags", held.get("Features", "")).split())
    units = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    return (
        f"{held.get('model name', platform.machine())} "
        f"({' '.join(units) or 'no vector units known'})"
    )


def commit() -> str:
    """The commit of the source tree, with + where files differ from it, figures' own results left
    out; "" outside of git.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ":(top)",
            ":(top,exclude)notebooks/figures/*.json",
            ":(top,exclude)notebooks/figures/*.png",
            ":(top,exclude)qsearch/zoo/*/scores.json",
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + "+" * bool(changed)


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
