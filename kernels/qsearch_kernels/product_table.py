"""The table of products on disk: under the name of the core, torch's version, caps and threads.

A table of another core, torch or version is not read, a broken file neither: the table is made
again. It is written to a file of its own and then renamed, so that two processes at once both read
a whole one; where nothing can be written it lives as long as the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

VERSION = 12  # of the content; a table of another version is made again
#: rows at which products are timed: one, a few, dozens, hundreds, thousands
ROWS = (1, 8, 64, 256, 1024)
#: rows, inputs and outputs of the products that are timed. For a few rows, reading the weight is
#: what takes time, and a small one is in a cache. For many rows and a small weight, what is done to
#: each number of a row takes as long as the product
SHAPES = (
    *((rows, 768, 4096) for rows in ROWS[:2]),
    *((rows, 768, 768) for rows in ROWS[2:]),
    *((rows, 192, 192) for rows in ROWS[3:]),
)
#: what caps a newer core's instructions in oneDNN, ATen, MKL and FBGEMM
_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


class Table(NamedTuple):
    """What one core does.

    Attributes:
        unsigned: whether rounded activations are uint8 (int8 elsewhere, 128 less).
        exact: integer product -> what it is exact for, as `integer_sums.exactness` says.
        seconds: kind -> way -> seconds of one product at each of `SHAPES`; infinite where a way was
            not tried, hopeless at fewer rows.
    """

    unsigned: bool
    exact: Mapping[str, str]
    seconds: Mapping[str, Mapping[str, tuple[float, ...]]]

    def best(self, kind: str, place: int, ways: Iterable[str] | None = None) -> str:
        """The fastest way of `kind` at `SHAPES[place]`, among `ways` where they are given."""
        times = self.seconds[kind]
        return min(ways or times, key=lambda way: times[way][place])


def core() -> dict[str, Any]:
    """What a table is kept under."""
    known = torch.cpu.get_capabilities()
    name = known.get("cpu_name") or platform.processor() or platform.machine() or "unknown"
    units = " ".join(sorted(key for key, value in known.items() if value is True))
    return {
        "version": VERSION,
        "core": str(name),
        "units": hashlib.sha256(units.encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "aten": torch.backends.cpu.get_cpu_capability(),
        "caps": {cap: os.environ.get(cap, "") for cap in _CAPS},
        "threads": torch.get_num_threads(),
    }


def path() -> Path:
    """Where this core's table lies."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~").expanduser() / ".cache")
    digest = hashlib.sha256(json.dumps(core(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / "qsearch" / f"products-{digest}.json"


def load() -> Table | None:
    """This core's table from disk; None where there is none, or one that can't be read."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        if content["made on"] != core():
            return None
        seconds = {
            kind: {
                way: tuple(math.inf if t is None else float(t) for t in times)
                for way, times in ways.items()
            }
            for kind, ways in content["seconds"].items()
        }  # fmt: skip
        whole = all(len(t) == len(SHAPES) for ways in seconds.values() for t in ways.values())
        return Table(bool(content["unsigned"]), dict(content["exact"]), seconds) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(table: Table) -> None:
    """Write the table for later processes, where that can be done."""
    seconds = {
        kind: {way: [t if math.isfinite(t) else None for t in times] for way, times in ways.items()}
        for kind, ways in table.seconds.items()
    }
    content = {
        "made on": core(),
        "shapes": SHAPES,
        "unsigned": table.unsigned,
        "exact": table.exact,
    }
    place, name = path(), ""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=place.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            name = file.name
            json.dump({**content, "seconds": seconds}, file, indent=1)
        Path(name).replace(place)
        return
    if name:
        with contextlib.suppress(OSError):
            Path(name).unlink()
