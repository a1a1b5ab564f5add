"""A profile of a streamed pipeline in a process of its own: a test kills it in the middle of a
backward.

Arguments: folder of the pipeline, graph.json, file for unfinished work, file for the table, file
that is made when the second round of probes is in the middle of its backward ("" where nobody waits
for it).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from qsearch.core.graph import OpGraph
from qsearch.measure import profiling, tape
from qsearch.measure.estimators import probe
from qsearch.measure.pipelines import Prompts, Sampling, load_pipeline


def main() -> None:
    """Profile, and wait in the middle where asked."""
    folder, graph, partial, out, waits = map(Path, sys.argv[1:])
    walks = [0]
    measured = probe.measure
    rounds = [0]

    def counted(*args: object) -> probe.Round:
        rounds[0] += 1
        return measured(*args)  # type: ignore[arg-type]

    probe.measure = counted
    through = tape._Entry.through

    def slow(self: tape._Entry, *args: object) -> object:
        walks[0] += 1
        if sys.argv[5] and rounds[0] == 2 and walks[0] > 45:
            waits.touch()
            time.sleep(60)
        return through(self, *args)  # type: ignore[arg-type]

    tape._Entry.through = slow  # type: ignore[method-assign,assignment]
    profiling._SAVE_SECONDS = 0.0
    profiling.profile_pipeline(
        load_pipeline(folder, offload="disk"),
        OpGraph.load(graph),
        Prompts(("a red circle", "a blue square")),
        Sampling(2, 4.0, 0, 2, 32),
        schemes=("int4-g16", "uint3-c"),
        bins=1,
        samples=2,
        batch=1,
        probes=2,
        partial=partial,
        key="a test",
    ).save(out)


if __name__ == "__main__":
    main()
