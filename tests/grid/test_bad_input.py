"""Plans and plug-ins that can't be carried out: one line, exit 2, nothing half-written."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from tests.conftest import Command
from tests.tiny_pipelines import build

from .world import TEXTS, World

pytestmark = pytest.mark.filterwarnings("ignore")
VERBS: dict[str, tuple[str, ...]] = {
    "evaluate": (),
    "apply": (),
    "export": ("--to", "step_policy"),
}


def config(model: Path, folder: Path, **changes: Any) -> None:
    """A run's config.yaml, with its prompts beside it."""
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("\n".join(TEXTS * 2))
    content: dict[str, Any] = {
        "model": str(model),
        "prompts": str(folder / "prompts.txt"),
        "sampling": {"steps": 4},
        "profile": {"schemes": ["int4-c", "int8-c"], "bins": 2, "samples": 2, "probes": 2},
        "allocate": {"average_bits": 6.5},
        "evaluate": {"samples": 3, "metrics": ["sqnr"], "uniform": "int4-c"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content | changes))


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A run of the tiny pipeline with its graph and a plan."""
    config(world.folder, tmp_path / "run")
    world.graph.save(tmp_path / "run" / "graph.json")
    Plan.uniform(world.graph, "int8-c").save(tmp_path / "run" / "plan.json")
    return tmp_path / "run"


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(command: Command, folder: Path, words: str, *arguments: object) -> None:
    """Exit 2 with one line that has `words`; what lies in `folder` is as it was."""
    before = files(folder)
    code, out, err = command(*arguments)
    lines = [line for line in err.splitlines() if line]
    assert code == 2, f"{out} {err}"
    assert words in " ".join(lines)
    assert len([line for line in lines if line.startswith("qsearch: ")]) == 1
    assert "Traceback" not in err
    assert files(folder) == before


def change(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the run's plan.json."""
    content = json.loads((run / "plan.json").read_text())
    edit(content)
    (run / "plan.json").write_text(json.dumps(content))


def cut(bounds: list[float], schemes: list[str]) -> Callable[[dict[str, Any]], None]:
    """A plan cut at `bounds`, whose first layer has `schemes`."""

    def edit(content: dict[str, Any]) -> None:
        content["steps"] = {"bounds": bounds}
        content["sites"][next(iter(content["sites"]))] = schemes

    return edit


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (cut([1.5], ["int4-c", "int8-c"]), "cover the sampler from its first step to its last"),
        (cut([0.6, 0.4], ["int4-c", "int8-c", "int4-c"]), "ascending fractions between 0 and 1"),
        (cut([0.0], ["int4-c", "int8-c"]), "ascending fractions between 0 and 1"),
        (cut([0.5], ["int4-c", "int8-c", "int4-c"]), "one for each range of steps"),
    ],
)
def test_ranges_that_do_not_cover_the_steps_are_refused(
    verb: str, edit: Callable[[dict[str, Any]], None], words: str, run: Path, command: Command
) -> None:
    change(run, edit)

    refused(command, run, words, verb, run, *VERBS[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_more_ranges_than_sampler_steps_are_refused(
    verb: str, run: Path, world: World, command: Command
) -> None:
    own = {x.name: ["int4-c", "int8-c"] * 3 if x.quantizable else "keep" for x in world.graph}
    Plan.make(world.graph, own, steps=StepRanges.equal(6)).save(run / "plan.json")

    words = "each of 6 ranges of steps needs a sampler step"
    refused(command, run, words, verb, run, *VERBS[verb])


def test_a_plan_of_more_ranges_than_sampler_steps_is_not_made(
    run: Path, world: World, command: Command
) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["allocate"] = {"layers": {"*": "int4-c"}, "steps": 6}
    content["profile"]["bins"] = 4
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    assert command("profile", run)[0] == 0

    refused(command, run, "each of 6 ranges of steps needs a sampler step", "allocate", run)


@pytest.mark.parametrize("verb", ["show", *VERBS])
def test_a_plan_of_version_1_with_an_unknown_key_is_refused(
    verb: str, run: Path, command: Command
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["header"]["schema"] = "qsearch.plan/1"
        content["layers"] = content.pop("sites")
        del content["steps"]
        content["stepz"] = 3

    change(run, edit)
    given = run / "plan.json" if verb == "show" else run

    refused(command, run, "unknown key 'stepz'", verb, given, *VERBS.get(verb, ()))


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[None]:
    """A distribution whose plug-ins of every kind fail while they are imported."""
    folder = tmp_path / "site-packages"
    info = folder / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "broken_plugin.py").write_text("raise RuntimeError('no such driver\\nsecond line')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    kinds = ("formats", "transforms", "activations", "quantizers", "metrics", "solvers",
             "estimators", "exporters", "surrogates")  # fmt: skip
    (info / "entry_points.txt").write_text(
        "\n".join(f"[qsearch.{kind}]\nzbroken = broken_plugin" for kind in kinds)
    )
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("broken_plugin", None)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("verb", "section", "key", "value"),
    [
        ("profile", "profile", "schemes", ["zbroken4-c"]),
        ("profile", "profile", "schemes", ["int4-c+a8~zbroken"]),
        ("profile", "profile", "schemes", ["int4-c@zbroken"]),
        ("profile", "profile", "schemes", ["int4-c+a8zz"]),
        ("profile", "profile", "metrics", ["zbroken"]),
        ("profile", "profile", "estimator", "zbroken"),
        ("evaluate", "evaluate", "metrics", ["zbroken"]),
    ],
)
def test_a_plug_in_that_fails_while_it_is_imported_is_named(
    verb: str, section: str, key: str, value: Any, run: Path, command: Command
) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(content))

    refused(command, run, "can't be imported: RuntimeError: no such driver", verb, run)


@pytest.mark.usefixtures("broken")
def test_an_exporter_that_fails_while_it_is_imported_is_named(run: Path, command: Command) -> None:
    words = "can't be imported: RuntimeError: no such driver"
    refused(command, run, words, "export", run, "--to", "zbroken")


@pytest.mark.usefixtures("broken")
def test_a_broken_plug_in_stops_nothing_but_itself(run: Path, command: Command) -> None:
    code, out, err = command("profile", run)

    assert code == 0, f"{out} {err}"
    for kind in ("formats", "transforms", "metrics", "exporters"):
        code, out, err = command("list", kind)
        assert code in (0, 2), f"{kind}: {out} {err}"
        assert "Traceback" not in err


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan 2.2 of random weights, with a profiled run."""
    folder = tmp_path_factory.mktemp("wan")
    build("wan_22").save_pretrained(folder / "pipe")
    size = {"height": 16, "width": 16, "num_frames": 5}
    changes = {
        "sampling": {"steps": 4, "guidance": 1.0, "call": size},
        "profile": {"schemes": ["int8-c+a8", "int8-c+a4"], "bins": 4, "samples": 2, "probes": 2},
        "allocate": {"average_bits": 9.0, "steps": 4},
    }  # fmt: skip
    config(folder / "pipe", folder / "run", **changes)
    return folder / "run"


def test_a_choice_where_its_component_does_not_run_is_refused_and_none_is_made(
    wan: Path, tmp_path: Path, command: Command
) -> None:
    code, out, err = command("profile", wan)
    assert code == 0, f"{out} {err}"
    code, out, err = command("allocate", wan)
    assert code == 0, f"{out} {err}"
    shutil.copytree(wan, tmp_path / "run")
    graph = OpGraph.load(tmp_path / "run" / "graph.json")
    site = next(x.name for x in graph.quantizable if x.name.startswith("transformer."))

    def edit(content: dict[str, Any]) -> None:
        content["steps"] = {"ranges": 4}
        content["sites"][site] = ["int8-c+a8", "int8-c+a8", "int8-c+a8", "int8-c+a4"]

    change(tmp_path / "run", edit)

    for verb in ("evaluate", "apply"):
        refused(command, tmp_path / "run", "transformer runs in steps", verb, tmp_path / "run")
