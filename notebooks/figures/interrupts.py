"""Ctrl-C and SIGKILL at random moments of every verb: seconds to the prompt, what is said, what is
left.

    PYTHONPATH=. python notebooks/figures/interrupts.py [--moments 20] [--verbs profile evaluate
    ...] [--signals SIGINT SIGKILL]

Each command has a terminal of its own. Ctrl-C is typed there; SIGKILL hits the command alone. The
moments of a verb fall one after another into the same folder, so that it goes on from where it was
interrupted; whenever it comes to its end, what it wrote is compared with that of a command that
nobody interrupted, and the next moment begins anew (`tests/interruption.py`). `start` is a command
that has just been typed, while Python imports; all others are forks of a process that has imported
everything. Written to interrupts.json after each verb; the same command goes on with the verbs
that the file lacks, or holds of another commit: each row has its own.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from figure import commit, publish

#: seconds to the prompt that are promised
PROMISED = 5.0


def row(verb: str, how: signal.Signals, found: Any) -> dict[str, Any]:
    """What is published of one verb and signal."""
    times, everything = [e.seconds for e in found.cut], [*found.cut, *found.ended]
    return {
        "verb": verb,
        "signal": how.name,
        "whole, s": found.whole.seconds,
        "interrupted": len(found.cut),
        "median, s": statistics.median(times) if times else 0.0,
        "longest, s": max(times, default=0.0),
        f"over {PROMISED:g} s": sum(t > PROMISED for t in times),
        "said what is kept": sum("goes on from there" in e.text for e in found.cut),
        "tracebacks": sum("Traceback" in e.text for e in everything),
        "terminal as before": sum(e.tidy for e in found.cut),
        "processes left": sum(e.processes for e in everything),
        "last command, s": found.ended[-1].seconds,
        "came to its end": len(found.same),
        "same artefacts": sum(found.same),
        "left behind": ", ".join(found.left),
    }


def earlier() -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of interrupts.json by verb and signal."""
    with suppress(OSError, ValueError):
        held = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
        return {(row["verb"], row["signal"]): row for row in held["rows"]}
    return {}


def main() -> None:
    """Interrupt, and publish after each verb."""
    from tests.interruption import VERBS, Shell, moments, prepared

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--verbs", nargs="*", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--signals", nargs="*", default=["SIGINT", "SIGKILL"])
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows, now = earlier(), commit().rstrip("+")
    with tempfile.TemporaryDirectory(prefix="qsearch-interrupts-") as folder:
        shell = Shell(Path(folder))
        ready = prepared(shell)
        for verb in options.verbs:
            for name in options.signals:
                if rows.get((verb, name), {}).get("commit") == now:
                    continue
                how = signal.Signals[name]
                found = row(verb, how, moments(shell, ready, verb, options.moments, how))
                rows[verb, name] = {**found, "commit": now, "load": os.getloadavg()[1]}
                print(rows[verb, name], flush=True)
                publish(__file__, [*rows.values()], title="Interrupted commands", seed=0)


if __name__ == "__main__":
    main()
