"""Campaigns in processes of their own, for tests of what happens when something dies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from qsearch.core.graph import OpGraph
from qsearch.core.trials import Trials
from tests.ray_cluster import environment

#: measures argv[2] plans of the pipeline in the folder argv[1] in the setting argv[3], with the
#: options argv[4]; a line for each plan, then how many were measured here
SCRIPT = """
import json, os, sys
from pathlib import Path
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.storage import storage_url
from qsearch.decide.draws import draw
from qsearch.measure.campaign import Campaign, measure_plans
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.pipelines import Sampling, scene_prompts
from qsearch.measure.setting import EvaluationSetting

if __name__ == "__main__":
    folder, count, key = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    graph = OpGraph.load(folder / "graph.json")
    setting = EvaluationSetting(scene_prompts(8, 1), Sampling(steps=3, seed=3), ("sqnr",), key)
    where = storage_url("env:TRIALS")
    campaign = Campaign(folder / "pipe", graph, setting, where, lapse=6.0)
    plans = draw(graph, ("uint2-c", "uint4-c", "uint8-c"), count)
    one = lambda n: print("one", flush=True) if n else None
    say = lambda line: print("said:", line, flush=True)
    try:
        options = ExecutorOptions(**json.loads(sys.argv[4]))
        print("measured", measure_plans(campaign, plans, options, progress=one, say=say))
    except QSearchError as error:
        print("refused:", error, flush=True)
        sys.exit(2)
"""


class Command:
    """A running campaign."""

    def __init__(self, folder: Path, url: str, count: int, key: str, **options: Any) -> None:
        self.folder, self.url, self.key = folder, url, key
        (folder / "campaign.py").write_text(SCRIPT)
        arguments = [str(folder), str(count), key, json.dumps(options)]
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "campaign.py"), *arguments],
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
    trials = Trials(url, OpGraph.load(folder / "graph.json"))
    return Counter(t.name for t in trials.all() if t.setting == key)
