"""The main job before and after: CPU seconds and peak memory of this tree and of an older commit,
alternately.

    python notebooks/figures/main_job_pairs.py [--before 97b68e4] [--pairs 3] [--models scenes-dit
    scenes-unet]

Each run is a process of its own with one thread, into a new folder, with the config of the older
commit: the same question. CPU seconds are those of the process and its children, so that what else
the machine does counts little. Writes main_job_pairs.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from figure import publish

ROOT = Path(__file__).parents[2]


def timed(tree: Path, asked: Path, folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory in MiB of `qsearch run` on a config in a source tree."""
    content = yaml.safe_load(asked.read_text(encoding="utf-8"))
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(content | {"folder": str(folder)}), encoding="utf-8")
    paths = os.pathsep.join([str(tree), str(tree / "kernels")])
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "qsearch.cli", "run", str(config)],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{tree}: `qsearch run {config}` ended with {os.waitstatus_to_exitcode(status)}"
        )
    return {
        "seconds": time.monotonic() - began,
        "CPU seconds": used.ru_utime + used.ru_stime,
        "peak MiB": used.ru_maxrss / 1024,
    }


def main() -> None:
    """Run in pairs, publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", default="97b68e4")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["scenes-dit", "scenes-unet"])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        old = Path(place) / "before"
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--detach", old, options.before], check=True
        )
        try:
            for model in options.models:
                asked = old / "configs" / f"{model}.yaml"
                found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
                for pair in range(options.pairs):
                    for name, tree in (("before", old), ("after", ROOT)):
                        made = timed(tree, asked, Path(place) / f"{model}-{name}-{pair}")
                        found[name].append(made)
                        print(model, name, made, flush=True)
                for what in ("seconds", "CPU seconds", "peak MiB"):
                    before, after = ([r[what] for r in found[n]] for n in ("before", "after"))
                    ratios = [a / b for a, b in zip(after, before, strict=True)]
                    rows.append(
                        {
                            "model": model,
                            "what": what,
                            "before": statistics.median(before),
                            "after": statistics.median(after),
                            "ratio": statistics.median(ratios),
                            "ratios": " ".join(f"{r:.3f}" for r in ratios),
                        }
                    )
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", old], check=True)
    publish(__file__, rows, title=f"The main job, {options.before} and now", seed=0)


if __name__ == "__main__":
    main()
