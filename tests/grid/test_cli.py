"""Every kind of choice through the verbs of the shell: exit 0 with what it says on disk, or exit 2
and one line.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from qsearch.core.plan import Plan
from tests.conftest import Command

from .kinds import KINDS, REST, Kind
from .test_bad_input import config, files
from .world import World

pytestmark = pytest.mark.filterwarnings("ignore")
#: verbs in the order of work, with what they leave in the run's folder
VERBS: dict[str, tuple[tuple[str, ...], str]] = {
    "allocate": ((), "plan.json"),
    "show": ((), ""),
    "evaluate": ((), "results.json"),
    "explain": ((), "attribution.parquet"),
    "apply": ((), "model.safetensors"),
    "export": (("--to", "sdnq", "--nearest"), "export-sdnq"),
}
#: verb -> what it may say instead
REFUSALS = {
    "explain": "the table has no",
    "apply": "not attention's tensors",
    "export": (
        "no file of sdnq says what happens inside attention|a file of sdnq holds for all sampler "
        "steps"
    ),
}


@pytest.fixture(scope="session")
def profiled(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a table of two schemes."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    config(world.folder, folder)
    return folder


def spelt(world: World, kind: Kind) -> dict[str, object]:
    """The section `allocate` of a plan by hand."""
    layers: dict[str, object] = {
        name: held for name, held in kind.layers(world.graph).items() if held != REST
    }
    sites = {pattern: held[0] if len(held) == 1 else list(held) for pattern, held in kind.sites}
    return {"layers": {**layers, "*": REST}, "sites": sites, "steps": kind.ranges}


@pytest.mark.parametrize(
    "name",
    [pytest.param(k, marks=() if k == "ranges of inputs" else pytest.mark.slow) for k in KINDS],
)
def test_every_verb_of_the_shell_carries_it_out_or_refuses_in_one_line(
    name: str, world: World, profiled: Path, tmp_path: Path, command: Command
) -> None:
    if not (profiled / "sensitivity.parquet").is_file():
        assert command("profile", profiled)[0] == 0
    run = tmp_path / "run"
    shutil.copytree(profiled, run)
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["allocate"] = spelt(world, KINDS[name])
    content["prompts"] = str(run / "prompts.txt")
    (run / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    for verb, (more, made) in VERBS.items():
        before = files(run)
        code, out, err = command(verb, run / "plan.json" if verb == "show" else run, *more)
        assert code in (0, 2), f"{verb}: {code} {out} {err}"
        if code == 2:
            said = " ".join(err.split("qsearch: ")[-1].split())
            assert any(words in said for words in REFUSALS[verb].split("|")), f"{verb}: {err}"
            assert "Traceback" not in err
            assert files(run) == before
        elif made:
            assert (run / made).exists()
    plan = Plan.load(run / "plan.json", world.graph)
    assert plan.choices == world.plan(KINDS[name]).choices
