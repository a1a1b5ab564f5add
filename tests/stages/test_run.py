"""A config end to end, on the zoo's DiT: everything is written, nothing is done twice, and a killed
run ends where it would have.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from qsearch.core.errors import InfeasibleBudget, QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.core.trials import Trials
from qsearch.measure import evaluation, pipelines
from qsearch.report import page
from qsearch.stages import config
from qsearch.stages.allocate import allocate
from qsearch.stages.folder import Run
from qsearch.stages.run import run

FILES = {
    "config.yaml",
    "graph.json",
    "sensitivity.parquet",
    "plan.json",
    "trials.db",
    "results.json",
    "contact_sheet.png",
    "report.html",
}
PLANS = ["full precision", "uniform uint4-c", "plan", "random"]
STEPS, SAMPLES, BITS = 3, 4, 5.0
#: relative difference of sensitivities between two processes: another number of threads adds floats
#: up in another order
ROUNDING = 1e-3


def settings(folder: Path, **changes: Any) -> config.Config:
    """A job of seconds: two schemes, one bin, three steps, four pictures."""
    content: dict[str, Any] = {
        "model": "scenes-dit",
        "folder": str(folder),
        "sampling": {"steps": STEPS, "batch": 8},
        "profile": {
            "schemes": ["uint2-c", "uint8-c"],
            "bins": 1,
            "samples": 2,
            "estimator": "sweep",
        },
        "allocate": {"average_bits": BITS},
        "evaluate": {"samples": SAMPLES, "metrics": ["sqnr", "ssim", "alignment"]},
    }
    return config.parse(
        {
            k: {**content.get(k, {}), **v} if isinstance(v, dict) else v
            for k, v in {**content, **changes}.items()
        },
        "the test",
    )


class Heard:
    """A `Progress` that remembers: what was said, and how far every loop went."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.loops: dict[str, list[int]] = {}
        self.totals: dict[str, int] = {}

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        self.totals[title] = self.totals.get(title, 0) + total
        yield self.loops.setdefault(title, []).append

    @property
    def skipped(self) -> set[str]:
        """Stages that had nothing to do."""
        return {
            line.partition(":")[0]
            for line in self.lines
            if "up to date" in line or "measured before" in line
        }


@contextmanager
def forwards() -> Iterator[list[str]]:
    """Class names of all modules that are called inside the block."""
    seen: list[str] = []
    handle = register_module_forward_pre_hook(
        lambda module, args: seen.append(type(module).__name__)
    )
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Heard]:
    """A whole run: its folder, its rows, and what it said."""
    folder, heard = tmp_path_factory.mktemp("run") / "dit", Heard()
    return folder, run(settings(folder), heard), heard


@pytest.fixture
def folder(finished: tuple[Path, list[dict[str, Any]], Heard], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "dit"))


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is drawn: it takes longer than all the rest of a job of seconds."""
    monkeypatch.setattr(page, "write_report", lambda *args, **kwargs: None)


def layers(folder: Path) -> dict[str, str]:
    plan: dict[str, str] = json.loads((folder / "plan.json").read_text())["sites"]
    return plan


def table(folder: Path) -> dict[tuple[str, str], float]:
    frame = SensitivityTable.load(folder / "sensitivity.parquet").frame
    return dict(
        zip(zip(frame["site"], frame["scheme"], strict=True), frame["estimate"], strict=True)
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_a_run_writes_every_file_and_leaves_no_other(
    finished: tuple[Path, list[dict[str, Any]], Heard],
) -> None:
    folder, _, _ = finished

    pictures = {f"pictures/{name.replace(' ', '-')}.png" for name in PLANS}
    assert set(bytes_of(folder)) == FILES | pictures


def test_the_files_belong_together_and_keep_the_budget(
    finished: tuple[Path, list[dict[str, Any]], Heard],
) -> None:
    folder, _, _ = finished

    graph = OpGraph.load(folder / "graph.json")
    plan = Plan.load(folder / "plan.json", graph)
    assert plan.solver.status == "optimal"
    assert plan.achieved.average_bits <= BITS
    assert {site for site, _ in table(folder)} == {layer.name for layer in graph.quantizable}
    assert len(Trials(folder / "trials.db", graph).all()) == len(PLANS)


def test_the_rows_compare_four_plans_with_errors(
    finished: tuple[Path, list[dict[str, Any]], Heard],
) -> None:
    folder, rows, _ = finished

    assert [row["plan"] for row in rows] == PLANS
    assert json.loads((folder / "results.json").read_text())["rows"] == rows
    assert [row["average_bits"] <= BITS for row in rows] == [False, True, True, True]
    for row in rows:
        assert set(row["metrics"]) - {"output_sqnr"} == {"sqnr", "ssim", "alignment", "noise"}
        assert [k for k, (_, error) in row["metrics"].items() if error < 0] == []
    assert rows[0]["metrics"]["noise"] == [0.0, 0.0]
    assert rows[0]["metrics"]["ssim"][0] == pytest.approx(1.0, abs=1e-5)
    assert min(row["metrics"]["noise"][0] for row in rows[1:]) > 0


def test_every_stage_says_what_it_did_and_every_bar_reaches_its_end(
    finished: tuple[Path, list[dict[str, Any]], Heard],
) -> None:
    _, _, heard = finished

    assert list(dict.fromkeys(line.partition(":")[0] for line in heard.lines)) == [
        "scenes-dit",  # what was chosen: sampler, samples, metrics
        "profile",
        "evaluate",
        "extract",
        "allocate",
        "report",
        "next",
    ]
    went = {title: sum(steps) for title, steps in heard.loops.items()}
    ends = {t: total for t, total in heard.totals.items() if not t.startswith("loading ")}
    assert {
        title: went[title] for title in ends
    } == ends  # loading goes by memory, which may shrink
    assert heard.totals["evaluate"] == len(PLANS) * STEPS  # one batch a plan


def test_the_config_in_the_folder_repeats_the_run(
    finished: tuple[Path, list[dict[str, Any]], Heard],
) -> None:
    assert config.load(finished[0] / "config.yaml") == settings(finished[0])


# ---------------------------------------------------------------------------- nothing is done twice


def test_a_second_call_skips_every_stage_without_loading_or_calling_a_model(
    finished: tuple[Path, list[dict[str, Any]], Heard], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows, _ = finished
    before, heard = bytes_of(folder), Heard()

    def loading(*_: Any) -> None:
        raise AssertionError("a pipeline is loaded")

    monkeypatch.setattr(pipelines, "load_pipeline", loading)
    with forwards() as called:
        again = run(settings(folder), heard)

    assert called == []
    assert again == rows
    assert heard.skipped == {"extract", "profile", "allocate", "evaluate", "report"}
    assert heard.totals == {}
    after = bytes_of(folder)
    assert {name for name in after if after[name] != before[name]} == set()


@pytest.mark.usefixtures("without_report")
def test_a_second_call_imports_no_library_of_models(folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from qsearch.stages.run import run; "
        "run(Path(sys.argv[1])); names = ('diffusers', 'transformers', 'torchmetrics'); "
        "print(*(name for name in names if name in sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], check=True, capture_output=True, text=True
    )

    assert done.stdout.split() == []


def test_another_budget_repeats_only_allocation_and_evaluation(folder: Path) -> None:
    before, heard = bytes_of(folder), Heard()

    with forwards() as called:
        rows = run(settings(folder, allocate={"average_bits": 3.5}), heard)

    assert heard.skipped == {"extract", "profile"}
    after = bytes_of(folder)
    assert {"graph.json", "sensitivity.parquet"} & {
        name for name in after if after[name] != before[name]
    } == set()
    assert layers(folder) != json.loads(before["plan.json"])["sites"]
    assert [row["average_bits"] <= 3.5 for row in rows] == [False, False, True, True]
    # Full precision is the reference; of the others only the new ones: three steps and one recorded
    # call each, of full precision's the calls are recorded; three calls more show how the pipeline
    # makes pictures.
    assert heard.totals["evaluate"] == 3 * STEPS
    assert "profile" not in heard.totals
    assert called.count("PixArtTransformer2DModel") == 3 * (STEPS + 1) + 3


@pytest.mark.usefixtures("without_report")
def test_a_refined_plan_keeps_the_budget_and_is_measured_no_noisier(folder: Path) -> None:
    def planned() -> tuple[Plan, list[str]]:
        heard = Heard()
        job = Run(settings(folder, allocate={"refine": 2}), heard)
        graph = OpGraph.load(folder / "graph.json")
        return allocate(
            job, graph, SensitivityTable.load(folder / "sensitivity.parquet", graph.id)
        ), heard.lines

    plan, said = planned()

    assert plan.solver.name == "ilp, refined"
    assert plan.achieved.average_bits <= BITS
    before, after = map(
        float,
        re.findall(r"noise power ([0-9.e-]+) before, ([0-9.e-]+) after", " ".join(said))[0],
    )
    assert 0 < after <= before
    assert planned() == (plan, ["allocate: plan.json is up to date"])


@pytest.mark.slow
def test_other_metrics_repeat_only_the_evaluation(folder: Path) -> None:
    heard = Heard()

    rows = run(settings(folder, evaluate={"metrics": ["sqnr"]}), heard)

    assert heard.skipped == {"extract", "profile", "allocate"}
    assert set(rows[1]["metrics"]) == {"sqnr", "noise", "output_sqnr"}


def test_a_lost_report_is_made_from_what_was_measured(folder: Path) -> None:
    heard = Heard()
    (folder / "report.html").unlink()
    (folder / "results.json").unlink()

    with forwards() as called:
        run(settings(folder), heard)

    assert called == []
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "results.json").exists()


def spoil(path: Path, how: str) -> None:
    """Cut a file in two, or change something in it and leave its header as it was."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        whole = json.loads(path.read_text())
        section = "sites" if path.name == "plan.json" else "layers"
        first = next(iter(whole[section]))
        whole[section][first] = (
            "uint2-t" if path.name == "plan.json" else whole[section][first] | {"macs": 1}
        )
        path.write_text(json.dumps(whole))


@pytest.mark.usefixtures("without_report")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("graph.json", "truncated"),
        ("graph.json", "changed"),
        ("plan.json", "truncated"),
        ("plan.json", "changed"),
    ],
)
def test_a_spoilt_file_is_made_again_and_nothing_else(folder: Path, name: str, how: str) -> None:
    before = layers(folder)
    spoil(folder / name, how)
    heard = Heard()

    run(settings(folder), heard)

    stage = {"graph.json": "extract", "plan.json": "allocate"}[name]
    assert heard.skipped - {"report"} == {"extract", "profile", "allocate", "evaluate"} - {
        stage
    }  # the report names its folder, which is a copy here
    assert layers(folder) == before


def test_a_budget_out_of_reach_is_said_before_anything_is_measured(folder: Path) -> None:
    (folder / "sensitivity.parquet").unlink()
    heard = Heard()

    with (
        pytest.raises(
            InfeasibleBudget,
            match="no plan reaches average_bits 1; the least with these choices is",
        ),
        forwards() as called,
    ):
        run(settings(folder, allocate={"average_bits": 1.0}), heard)

    assert called == []
    assert heard.totals == {}


# ----------------------------------------------------------------------------------- and if it dies


class Killed(Exception):
    """What stands for SIGKILL where a process of its own is not needed."""


@pytest.mark.usefixtures("without_report")
def test_an_evaluation_that_dies_measures_only_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    (folder / "trials.db").unlink()
    made: list[str] = []

    def mortal(*args: Any, **kwargs: Any) -> Any:
        made.append("plan")
        if len(made) == 3:
            raise Killed
        return make(*args, **kwargs)

    make = evaluation.make
    monkeypatch.setattr(evaluation, "make", mortal)
    with pytest.raises(Killed):
        run(settings(folder))
    monkeypatch.setattr(evaluation, "make", make)
    heard = Heard()

    again = run(settings(folder), heard)

    # the reference, the plan, the random one; uniform was measured
    assert heard.totals["evaluate"] == 3 * STEPS
    assert [row["plan"] for row in again] == PLANS
    for ours, theirs in zip(again, rows, strict=True):
        assert {k: v[0] for k, v in ours["metrics"].items()} == pytest.approx(
            {k: v[0] for k, v in theirs["metrics"].items()}, rel=1e-4, abs=1e-9
        )


#: dies as soon as it has measured its 21st choice
IN_THE_SWEEP = """
import os, signal, sys
from contextlib import contextmanager
from qsearch.core.progress import Silent
from qsearch.measure import profiling
from qsearch.stages import config
from qsearch.stages.run import run

class Mortal(Silent):
    @contextmanager
    def track(self, title, total):
        done = 0
        def advance(n):
            nonlocal done
            done += n
            if title == "profile" and done > 20:
                os.kill(os.getpid(), signal.SIGKILL)
        yield advance

profiling._SAVE_SECONDS, profiling._SAVE_SHARE = -1.0, 1e9
run(config.load(sys.argv[1]), Mortal())
"""


@pytest.mark.slow
def test_a_run_killed_in_the_sweep_goes_on_there_and_ends_with_the_same_plan(
    finished: tuple[Path, list[dict[str, Any]], Heard], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    config.save(settings(killed), tmp_path / "mine.yaml")
    died = subprocess.run(
        [sys.executable, "-c", IN_THE_SWEEP, str(tmp_path / "mine.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (killed / "sensitivity.partial.parquet").exists()
    assert not (killed / "plan.json").exists()
    heard = Heard()

    run(settings(killed), heard)

    assert heard.loops["profile"][0] == 21  # twenty of them measured before
    assert layers(killed) == layers(finished[0])
    assert table(killed) == pytest.approx(table(finished[0]), rel=ROUNDING)
    assert set(bytes_of(killed)) == set(bytes_of(finished[0]))


def kill_when(command: list[str], there: Callable[[], bool], seconds: float = 300.0) -> int:
    """Start a process, kill it as soon as `there()`; its return code."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    deadline = time.monotonic() + seconds
    while process.poll() is None and not there():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.slow
def test_a_run_killed_at_any_stage_ends_with_the_same_plan(
    finished: tuple[Path, list[dict[str, Any]], Heard], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    config.save(settings(killed), tmp_path / "mine.yaml")
    command = [sys.executable, "-m", "qsearch.cli", "run", str(tmp_path / "mine.yaml")]
    moments: tuple[Callable[[], bool], ...] = (
        (killed / "graph.json").exists,
        (killed / "sensitivity.parquet").exists,
        lambda: len(list(killed.glob("pictures/*.png"))) >= 2,
    )

    assert [kill_when(command, moment) for moment in moments] == [-signal.SIGKILL] * 3
    subprocess.run(command, check=True, capture_output=True)

    assert layers(killed) == layers(finished[0])
    assert set(bytes_of(killed)) == set(bytes_of(finished[0]))


# -------------------------------------------------------------------------------------- other input


def test_prompts_of_one_s_own_are_read_from_a_file(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "".join(f"a red ring left of a blue square number {i}\n\n" for i in range(6))
    )
    mine = settings(folder, prompts=str(prompts), evaluate={"metrics": ["sqnr"], "samples": 5})
    job = Run(mine)

    assert job.prompts(2, part=0).texts == (
        "a red ring left of a blue square number 0",
        "a red ring left of a blue square number 1",
    )
    assert job.prompts(4, part=1).texts[0] == "a red ring left of a blue square number 2"
    with pytest.raises(QSearchError, match="holds 6 prompts; profiling and evaluation need 7"):
        job.prompts(5, part=1)


def test_another_model_s_folder_has_another_fingerprint_but_its_records_do_not_count(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(
            '{"_class_name": "StableDiffusionPipeline"}'
        )
        (tmp_path / name / "weights.safetensors").write_bytes(b"the same")

    def fingerprint(name: str) -> str:
        return Run(config.Config(model=str(tmp_path / name), folder=tmp_path / "run")).fingerprint

    assert fingerprint("a") == fingerprint("b")
    (tmp_path / "b" / "scores.json").write_text("{}")
    assert fingerprint("a") == fingerprint("b")
    (tmp_path / "b" / "weights.safetensors").write_bytes(b"not same")
    assert fingerprint("a") != fingerprint("b")
