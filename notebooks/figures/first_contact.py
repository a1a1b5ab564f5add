"""First contact: an own SDXL-shaped and an own Flux-shaped folder from nothing to a report and a
file.

    PYTHONPATH=. python notebooks/figures/first_contact.py [--models stable_diffusion_xl flux]

Told are the commands that are typed, dead ends (exit codes other than 0), and seconds of each
command by the clock and of the processor. The weights are tiny and random. `FEW` are lines that a
person who wants an answer in minutes would change in the config that `init` wrote. Written to
first_contact.json after each model. How commands end that are interrupted: interrupts.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figure import publish

#: model -> the tool that its plan is for
MODELS = {"stable_diffusion_xl": "torchao", "flux": "gguf"}
#: settings of a walk that ends in minutes
FEW = {"steps": 4, "samples": 4, "probes": 4}


def typed(place: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """One command of the shell: how long it took, and its last line where it is a dead end."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "qsearch.cli", *words],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (done.stderr or done.stdout).strip().splitlines()
    return {
        "s": time.monotonic() - began,
        "processor s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "dead end": done.returncode != 0,
        "said": lines[-1] if lines and done.returncode else "",
    }


def few(config: Path) -> None:
    """Change the lines of `FEW` in a config."""
    lines = config.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        key, colon, _ = line.strip().partition(":")
        if colon and line.startswith("  ") and key in FEW:
            lines[i] = f"  {key}: {FEW[key]}"
    config.write_text("\n".join([*lines, ""]), encoding="utf-8")


def walk(place: Path, name: str, tool: str) -> list[dict[str, Any]]:
    """From a folder with a pipeline to a report and a file: a row a command."""
    from tests.tiny_pipelines import build

    build(name).save_pretrained(place / name)
    run, rows = f"runs/{name}", []
    for words in (
        ("init", name, "--for", tool),
        ("run", f"{name}.yaml"),
        ("export", run, "--to", tool),
    ):
        found = typed(place, words)
        rows.append({"command": " ".join(["qsearch", *words]), **found})
        print(rows[-1], flush=True)
        if words[0] == "init" and not found["dead end"]:
            few(place / f"{name}.yaml")
    made = [place / run / "report.html", *(place / run / f"export-{tool}").glob("*")]
    rows[-1]["files"] = sorted(path.name for path in made if path.is_file())
    return rows


def main() -> None:
    """Walk and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            rows += walk(Path(folder), name, MODELS[name])
            extra = {"dead ends": sum(row["dead end"] for row in rows), "load": os.getloadavg()[1]}
            publish(__file__, rows, title="First contact", seed=0, extra=extra)


if __name__ == "__main__":
    main()
