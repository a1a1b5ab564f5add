"""First contact: an own SDXL-shaped and an own Flux-shaped folder from nothing to a file, and Ctrl-C at random moments of every verb.

    PYTHONPATH=. python notebooks/figures/first_contact.py [--moments 20] [--verbs profile evaluate ...]

The walk: the commands that are typed, dead ends (exit codes other than 0), minutes. Ctrl-C: the whole group of processes gets SIGINT
at a random moment, on a terminal of its own; told are the seconds until it has ended, what it said, the cursor, what lies around, and
whether the same command then ends as it does without an interruption. `--kill` does the same with SIGKILL. Writes first_contact.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from figure import publish

#: model -> the tool that its plan is for
MODELS = {"stable_diffusion_xl": "torchao", "flux": "gguf"}
#: settings of a walk that ends in minutes on tiny weights
FEW = ("sampling.steps=6", "evaluate.samples=4", "profile.probes=6")
#: verb -> what is typed after it, and the file whose content tells whether it ended well
VERBS: dict[str, tuple[tuple[str, ...], str]] = {
    "extract": (("extract", "my-model", "-o", "RUN"), "graph.json"),
    "profile": (("profile", "RUN"), "sensitivity.parquet"),
    "allocate": (("allocate", "RUN"), "plan.json"),
    "evaluate": (("evaluate", "RUN"), "results.json"),
    "plans": (("evaluate", "RUN", "--plans", "10", "--workers", "2"), ""),
    "fit": (("fit", "RUN", "--surrogate", "ridge"), "surrogate"),
    "explain": (("explain", "RUN"), "attribution.parquet"),
    "apply": (("apply", "RUN"), "model.safetensors"),
    "export": (("export", "RUN", "--to", "torchao", "--nearest", "--force"), "export-torchao"),
    "bench": (("bench", "RUN", "--seconds", "0.01"), ""),
    "run": (("run", "RUN"), "report.html"),
}
#: seconds to the prompt that are promised
PROMISED = 5.0


def qsearch(*words: str) -> list[str]:
    """The command as its own process."""
    return [sys.executable, "-m", "qsearch.cli", *words]


def walk(place: Path, name: str, tool: str) -> dict[str, Any]:
    """From a folder with a pipeline to a report and a file: what was typed, and how it went."""
    from tests.tiny_pipelines import build

    build(name).save_pretrained(place / name)
    run = f"runs/{name}"
    typed = [
        ("init", name, "--for", tool),
        ("run", f"{name}.yaml"),
        ("export", run, "--to", tool),
    ]
    began, dead, said = time.monotonic(), [], []
    for words in typed:
        if words[0] == "run":  # a tiny model needs no hours; a person would leave this out
            text = (place / f"{name}.yaml").read_text()
            for setting in FEW:
                key, _, value = setting.partition("=")
                inner = key.rpartition(".")[2]
                lines = [
                    f"  {inner}: {value}" if line.startswith(f"  {inner}:") else line
                    for line in text.splitlines()
                ]
                text = "\n".join(lines) + "\n"
            (place / f"{name}.yaml").write_text(text)
        done = subprocess.run(
            qsearch(*words), cwd=place, capture_output=True, text=True, check=False
        )
        if done.returncode:
            dead.append(" ".join(words))
            said.append((done.stderr or done.stdout).strip().splitlines()[-1])
    return {
        "model": name,
        "typed": len(typed),
        "dead ends": len(dead),
        "minutes": (time.monotonic() - began) / 60,
        "report": (place / run / "report.html").is_file(),
        "file": any((place / run / f"export-{tool}").rglob("*")),
        "said": "; ".join(said),
    }


def prepared(place: Path) -> Path:
    """A finished run of a tiny model, to be interrupted in copies."""
    from tests.tiny_pipelines import build

    build("stable_diffusion_xl").save_pretrained(place / "my-model")
    run = place / "ready"
    run.mkdir()
    (run / "config.yaml").write_text(
        f"model: {place / 'my-model'}\nsampling: {{steps: 6}}\n"
        "profile: {schemes: ['uint4-c@gptq', uint8-c], probes: 6}\n"
        "allocate: {average_bits: 6}\nevaluate: {samples: 4}\nfit: {folds: 3}\n"
    )
    for words in (("run", "ready"), ("evaluate", "ready", "--plans", "8")):
        subprocess.run(qsearch(*words), cwd=place, check=True, capture_output=True)
    return run


def content(path: Path) -> str:
    """Digest of what an artefact says, without headers that name times and commands."""
    if not path.exists():
        return ""
    if path.suffix == ".parquet":
        import pandas as pd

        return hashlib.sha256(pd.read_parquet(path).to_csv().encode()).hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        if file.suffix == ".json" and b'"header"' in data:
            import json

            held = json.loads(data)
            held.pop("header")
            data = json.dumps(held, sort_keys=True).encode()
        sha.update(data)
    return sha.hexdigest()


def interrupted(words: Sequence[str], cwd: Path, after: float, how: int) -> dict[str, Any]:
    """One command on a terminal of its own, interrupted `after` seconds."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        qsearch(*words), cwd=cwd, stdout=theirs, stderr=theirs, stdin=theirs, start_new_session=True
    )
    os.close(theirs)
    heard = bytearray()

    def listen() -> None:
        with suppress(OSError):
            while part := os.read(ours, 4096):
                heard.extend(part)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
    finished = process.poll() is not None
    began = time.monotonic()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    process.wait(300)
    seconds = time.monotonic() - began
    thread.join(2)
    text = heard.decode(errors="replace")
    return {
        "finished": finished,
        "seconds": seconds,
        "told": "goes on from there" in text,
        "traceback": "Traceback" in text,
        "cursor": text.count("\x1b[?25l") <= text.count("\x1b[?25h"),
        "code": process.returncode,
    }


def moments(ready: Path, verb: str, count: int, how: int, seed: int) -> dict[str, Any]:
    """A verb interrupted at `count` random moments of its length, then brought to its end."""
    place = ready.parent
    words, artefact = VERBS[verb]
    rng = random.Random(f"{verb} {seed}")

    def fresh(name: str) -> tuple[Path, list[str]]:
        copy = Path(shutil.copytree(ready, place / name))
        for stale in ("unfinished.yaml", artefact):
            target = copy / stale
            if stale and target.is_dir():
                shutil.rmtree(target)
            elif stale:
                target.unlink(missing_ok=True)
        if verb == "evaluate":
            (copy / "trials.db").unlink()
        if verb == "extract":
            shutil.rmtree(copy)
        return copy, [name if word == "RUN" else word for word in words]

    whole, typed = fresh(f"{verb}-whole")
    began = time.monotonic()
    done = subprocess.run(qsearch(*typed), cwd=place, capture_output=True, text=True, check=False)
    length = time.monotonic() - began
    wanted = content(whole / artefact) if artefact else ""
    shutil.rmtree(whole)
    cut, typed = fresh(f"{verb}-whole")
    found = [interrupted(typed, place, rng.uniform(0.3, length), how) for _ in range(count)]
    again = subprocess.run(qsearch(*typed), cwd=place, capture_output=True, text=True, check=False)
    left = [p.name for p in cut.rglob(".*") if p.suffix in (".tmp", ".old")]
    left += [p.name for p in place.glob(f".{cut.name}*")]
    same = not artefact or content(cut / artefact) == wanted
    shutil.rmtree(cut)
    halted = [f for f in found if not f["finished"]]
    times = sorted(f["seconds"] for f in halted) or [0.0]
    return {
        "verb": verb,
        "seconds whole": length,
        "moments": count,
        "interrupted": len(halted),
        "median, s": times[len(times) // 2],
        "longest, s": times[-1],
        f"over {PROMISED:g} s": sum(t > PROMISED for t in times),
        "told what is kept": sum(f["told"] for f in halted),
        "tracebacks": sum(f["traceback"] for f in found),
        "cursor shown": all(f["cursor"] for f in halted),
        "then": "ends" if again.returncode == done.returncode == 0 else again.stderr[-200:],
        "same artefact": same,
        "left behind": len(left),
    }


def main() -> None:
    """Walk, interrupt and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--verbs", nargs="*", default=list(VERBS))
    parser.add_argument("--kill", action="store_true", help="SIGKILL instead of Ctrl-C")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        walks = [walk(place, name, tool) for name, tool in MODELS.items()]
        for row in walks:
            print(row, flush=True)
        extra = {"walks": walks, "signal": "SIGKILL" if options.kill else "SIGINT"}
        told = partial(publish, __file__, title="First contact", seed=options.seed)
        told(walks, extra=extra)
        rows: list[dict[str, Any]] = []
        ready = prepared(place) if options.verbs else place
        how = signal.SIGKILL if options.kill else signal.SIGINT
        for verb in options.verbs:  # told after each: all take an hour
            rows.append(moments(ready, verb, options.moments, how, options.seed))
            told(rows, extra={**extra, "load": os.getloadavg()[2]})


if __name__ == "__main__":
    main()
