"""Plans of a tiny pipeline measured, also in a process of its own, for tests of what happens when
something dies.

    python -m tests.measure.evaluation_process FOLDER PIPE KEY OPTIONS

measures the plans of `plans` in the setting KEY, into the storage that TRIALS names: a line for
each plan, then how many were measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.storage import storage_url
from qsearch.core.trials import Trials
from qsearch.decide.draws import draw
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.pipelines import Sampling, scene_prompts
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.setting import EvaluationSetting
from tests.ray_cluster import environment

PLANS = 12
ONCE = {f"random-0-{i:03d}": 1 for i in range(PLANS)}


def task(folder: Path, url: str, key: str, pipe: str = "pipe") -> EvaluationTask:
    """Of the pipeline FOLDER/PIPE, whose graph is FOLDER/graph.json."""
    setting = EvaluationSetting(scene_prompts(8, 1), Sampling(steps=6, seed=3), ("sqnr",), key)
    return EvaluationTask(folder / pipe, graph_of(folder), setting, url, lapse=6.0)


def plans(folder: Path) -> dict[str, Plan]:
    """Name -> plan."""
    return dict(draw(graph_of(folder), ("uint2-c", "uint4-c", "uint8-c"), PLANS))


def graph_of(folder: Path) -> OpGraph:
    return OpGraph.load(folder / "graph.json")


class Command:
    """A running measurement."""

    def __init__(
        self, folder: Path, url: str, key: str, *, pipe: str = "pipe", **options: Any
    ) -> None:
        arguments = [str(folder), pipe, key, json.dumps(options)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.measure.evaluation_process", *arguments],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(TRIALS=url),
        )

    def wait_for(self, plans: int) -> None:
        """Until so many plans are measured."""
        assert self.process.stdout is not None
        seen = 0
        while seen < plans:
            line = self.process.stdout.readline()
            assert line, f"it ended early: {self.process.communicate()}"
            seen += line == "one\n"

    def end(self, seconds: float = 600) -> tuple[int, str, str]:
        """Exit code, the rest of what it said, and standard error."""
        out, error = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, error


def stored(folder: Path, url: str, key: str) -> Counter[str]:
    """How often each plan was measured in a setting."""
    return Counter(t.name for t in Trials(url, graph_of(folder)).all() if t.setting == key)


def values(folder: Path, url: str, key: str) -> dict[str, object]:
    """Name of a plan -> what was measured of it in a setting."""
    found = Trials(url, graph_of(folder)).all()
    return {t.name: (t.metrics, t.samples) for t in found if t.setting == key}


def main() -> None:
    """The command."""
    folder, pipe, key, options = Path(sys.argv[1]), *sys.argv[2:]
    try:
        done = measure_plans(
            task(folder, storage_url("env:TRIALS"), key, pipe),
            plans(folder),
            ExecutorOptions(**json.loads(options)),
            progress=lambda n: print("one", flush=True) if n else None,
            say=lambda line: print("said:", line, flush=True),
        )
    except QSearchError as error:
        print("refused:", error, flush=True)
        sys.exit(2)
    print("measured", done)


if __name__ == "__main__":
    main()
