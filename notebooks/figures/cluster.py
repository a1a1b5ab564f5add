"""Beyond one machine: workers here, in processes and on Ray's nodes, their trials in a real
PostgreSQL.

    PYTHONPATH=. python notebooks/figures/cluster.py workers [--plans 64 --samples 4 --steps 4]
    PYTHONPATH=. python notebooks/figures/cluster.py trials [--count 10000]

Needs Debian's postgresql and the extras `ray` and `databases`. The server and a Ray cluster of two
nodes are started on loopback and thrown away. `workers` measures the same plans of scenes-dit by
one process, by pools and by Ray, and compares every number; seconds are of the clock and of the
processors (of the command, its processes and Ray's nodes), since other work on the machine makes
the clock's longer. `trials` fills the database with made-up trials, then times opening, resuming
and fitting. Written to cluster-PART.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from figure import publish

from qsearch import zoo
from qsearch.core.artifacts import digest
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan, said
from qsearch.core.trials import Trial, Trials
from qsearch.decide.draws import draw
from qsearch.graphs.extraction import extract
from qsearch.learn.fitting import fit
from qsearch.measure.executing import ExecutorOptions
from qsearch.measure.pipelines import (
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    scene_prompts,
)
from qsearch.measure.plan_evaluation import EvaluationTask, measure_plans
from qsearch.measure.setting import EvaluationSetting

SCHEMES = ("uint2-c", "uint3-c", "uint4-c", "uint8-c")
SEED = 11
#: (executor, workers), in the order in which they are timed
RACE = (("local", 1), ("pool", 2), ("ray", 2))
#: made-up trials that are added one by one; the rest is copied into the tables
_ADDED = 200
TICKS = os.sysconf("SC_CLK_TCK")


def graph_of(folder: Path) -> OpGraph:
    """The graph of scenes-dit, kept in the folder."""
    path = folder / "graph.json"
    if not path.is_file():
        pipe = load_pipeline(zoo.folder("scenes-dit"))
        model = denoiser_of(pipe)
        (call,) = record(pipe, scene_prompts(1, 0), Sampling(2), bins=1)
        extract(model, example_inputs(call, model), name="scenes-dit").save(path)
    return OpGraph.load(path)


def processors(roots: list[int]) -> float:
    """Seconds that these processes, all below them and those that they outlived have worked."""
    from tests.ray_cluster import below

    total = 0.0
    for process in {p for root in roots for p in (root, *below(root))}:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15])) / TICKS
    return total


def one_run(o: argparse.Namespace) -> None:
    """Measures plans in a process of its own, as the command line would."""
    graph = OpGraph.load(Path(o.folder) / "graph.json")
    setting = EvaluationSetting(
        scene_prompts(o.samples, 1), Sampling(steps=o.steps, seed=SEED), ("sqnr",), o.key
    )
    task = EvaluationTask(zoo.folder("scenes-dit"), graph, setting, os.environ["TRIALS"])
    options = ExecutorOptions(executor=o.executor, workers=o.workers, address=o.address)
    began = time.monotonic()
    first: list[float] = []
    plans = draw(graph, SCHEMES, o.plans, seed=SEED)
    count = measure_plans(
        task,
        plans,
        options,
        progress=lambda n: first.append(time.monotonic()) if n else None,
        say=lambda line: print(line, file=sys.stderr),
    )
    ended = time.monotonic()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    work = sum(u.ru_utime + u.ru_stime for u in used)
    print(json.dumps({"count": count, "s": ended - began, "first": first[0] - began, "cpu": work}))


def workers(o: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The same plans by every way; a row each."""
    from tests.databases import server as new_server
    from tests.ray_cluster import cluster, environment

    graph, rows = graph_of(folder), []
    expected: dict[str, str] = {}
    with ExitStack() as stack:
        server = stack.enter_context(new_server())
        ray = stack.enter_context(cluster())
        ray.head()
        ray.node()
        for turn, (executor, count) in enumerate(RACE):
            key = f"{executor} {count} {turn}"
            options = ["--plans", o.plans, "--samples", o.samples, "--steps", o.steps]
            how = ["--executor", executor, "--workers", count, "--key", key, "--folder", folder]
            where = ["--address", ray.address] if executor == "ray" else []
            before = processors([node.pid for node in ray.nodes])
            done = subprocess.run(
                [sys.executable, __file__, "one", *map(str, [*options, *how, *where])],
                env=environment(TRIALS=server.url()),
                capture_output=True,
                text=True,
                check=True,
            )
            time.sleep(3)  # Ray's nodes reap their workers
            nodes = processors([node.pid for node in ray.nodes]) - before
            said = json.loads(done.stdout.splitlines()[-1])
            found = {
                t.name: digest([t.metrics, t.samples])
                for t in Trials(server.url(), graph).all()
                if t.setting == key
            }
            expected = expected or found
            row = {
                "executor": executor,
                "workers": count,
                "plans": said["count"],
                "s": said["s"],
                "s to the first": said["first"],
                "s a plan after it": (said["s"] - said["first"]) / max(1, said["count"] - 1),
                "processor s": said["cpu"] + (nodes if executor == "ray" else 0.0),
                "same to the last digit": found == expected and len(found) == o.plans,
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def copied(url: str, plans: dict[str, tuple[str, Any, float]]) -> None:
    """Trials as PostgreSQL's COPY, the attributes those of the first one but for the plan's own."""
    import psycopg

    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        first = cursor.execute(
            "select study_id, trial_id, state, datetime_start, datetime_complete "
            "from trials where state = 'COMPLETE' order by trial_id limit 1"
        ).fetchone()
        assert first is not None
        study, trial, state, began, ended = first
        query = "select key, value_json from trial_user_attributes where trial_id = %s"
        known: dict[str, str] = dict(cursor.execute(query, (trial,)).fetchall())
        last = cursor.execute("select max(trial_id), max(number) from trials").fetchone()
        assert last is not None
        places = {name: last[0] + 1 + i for i, name in enumerate(plans)}
        columns = "trial_id, number, study_id, state, datetime_start, datetime_complete"
        with cursor.copy(f"copy trials ({columns}) from stdin") as copy:
            for i, place in enumerate(places.values()):
                copy.write_row((place, last[1] + 1 + i, study, state, began, ended))
        columns = "trial_id, objective, value, value_type"
        with cursor.copy(f"copy trial_values ({columns}) from stdin") as copy:
            for name, place in places.items():
                copy.write_row((place, 0, plans[name][2], "FINITE"))
        with cursor.copy(
            "copy trial_user_attributes (trial_id, key, value_json) from stdin"
        ) as copy:
            for name, place in places.items():
                plan, choices, value = plans[name]
                own = {"name": name, "plan": plan, "choices": choices}
                own |= {"metrics": {"sqnr": [value, 0.1]}, "samples": {"sqnr": [value] * 16}}
                for key, text in (known | {k: json.dumps(v) for k, v in own.items()}).items():
                    copy.write_row((place, key, text))


def trials(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Many made-up trials in PostgreSQL: a row for each thing that is done with them."""
    from tests.databases import server as new_server

    rows: list[dict[str, Any]] = []

    def timed(what: str, call: Callable[[], Any]) -> Any:
        began, work = time.monotonic(), time.process_time()
        found = call()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        row = {"what": what, "s": time.monotonic() - began}
        row |= {"processor s": time.process_time() - work, "peak MiB": memory}
        print(row, flush=True)
        rows.append(row)
        return found

    graph = graph_of(o.folder)
    dice = np.random.default_rng(SEED)
    harm = {
        (x.name, s): float(dice.lognormal()) * 4.0 ** -int(s[4])
        for x in graph.quantizable
        for s in SCHEMES
    }

    def metrics(plan: Plan) -> dict[str, tuple[float, float]]:
        noise = sum(harm.get((n, str(s)), 0.0) for n, held in plan.choices.items() for s in held)
        return {"sqnr": (-10 * float(np.log10(noise)), 0.1)}

    with new_server() as server:
        plans = timed("draw plans", lambda: draw(graph, SCHEMES, o.count, seed=SEED))
        held = timed("open an empty database", lambda: Trials(server.url(), graph))

        first = dict(list(plans.items())[:_ADDED])

        def write() -> None:
            for name, plan in first.items():
                found = metrics(plan)
                samples = {"sqnr": [found["sqnr"][0]] * 16}
                ups = {"sqnr": True}
                held.add(name, plan, found, "made up", samples=samples, higher_is_better=ups)

        timed(f"write {len(first)} trials, as workers do", write)
        rest = {name: plan for name, plan in plans.items() if name not in first}
        copies = {
            name: (plan.id, said(plan.choices), metrics(plan)["sqnr"][0])
            for name, plan in rest.items()
        }
        timed(f"copy {len(rest)} more into its tables", lambda: copied(server.url(), copies))
        new = timed("open the database", lambda: Trials(server.url(), graph))
        plan = plans["random-11-000"] if "random-11-000" in plans else next(iter(plans.values()))
        timed("resume: is a plan there, first", lambda: new.knows(plan.id, "x", stopped=True))
        timed("resume: is a plan there, next", lambda: new.knows(plan.id, "x", stopped=True))
        found: list[Trial] = timed("read all trials", new.measured)
        timed("fit xgboost, 5 folds", lambda: fit(graph, found, metric="sqnr", kind="xgboost"))
    return rows


def main() -> None:
    """Run a part, and put its rows beside those of the other."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["workers", "trials", "one"])
    parser.add_argument("--plans", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--executor", default="local")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--address")
    parser.add_argument("--key", default="")
    parser.add_argument("--folder", type=Path, default=Path("runs/cluster"))
    o = parser.parse_args()
    if o.part == "one":
        one_run(o)
        return
    o.folder.mkdir(parents=True, exist_ok=True)
    rows = workers(o, o.folder) if o.part == "workers" else trials(o)
    publish(
        str(Path(__file__).with_name(f"cluster-{o.part}.py")),
        rows,
        title=f"cluster, {o.part}",
        seed=SEED,
    )


if __name__ == "__main__":
    main()
