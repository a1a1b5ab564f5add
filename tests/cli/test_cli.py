"""The command line: every verb is there, artefacts fit a narrow terminal, and a mistake is one
line, exit code 2, nothing half-written.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qsearch.core import plugins
from qsearch.core.artifacts import Header, write_json
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.trials import Trials
from qsearch.report.text import cell
from qsearch.stages import config
from qsearch.stages.evaluate import RESULTS
from tests.conftest import Command
from tests.report.synthetic import (
    PLANS,
    SCHEMES,
    make_attribution,
    make_plan,
    make_rows,
    make_table,
    pixart,
)

BUILT = (
    "init",
    "report",
    "set",
    "doctor",
    "run",
    "extract",
    "profile",
    "allocate",
    "evaluate",
    "fit",
    "explain",
    "apply",
    "bench",
    "export",
    "import",
    "show",
    "list",
)
ARTEFACTS = (
    "graph.json",
    "sensitivity.parquet",
    "plan.json",
    "attribution.parquet",
    "results.json",
    "trials.db",
)
GRAPH = pixart()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a model: every artefact, by its owner."""
    folder = tmp_path_factory.mktemp("run")
    plan = make_plan(GRAPH)
    rows = make_rows(GRAPH, plan)
    config.save(config.Config(model="scenes-dit", folder=folder), folder / "config.yaml")
    GRAPH.save(folder / "graph.json")
    make_table(GRAPH).save(folder / "sensitivity.parquet")
    plan.save(folder / "plan.json")
    make_attribution(GRAPH).save(folder / "attribution.parquet")
    write_json(folder / "results.json", Header(RESULTS, graph=GRAPH.id), {"rows": rows})
    trials = Trials(folder / "trials.db", GRAPH)
    plans = (Plan.uniform(GRAPH, "keep"), Plan.uniform(GRAPH, "uint4-c"), plan, plan)
    for name, chosen, row in zip(PLANS, plans, rows, strict=True):
        trials.add(name, chosen, {k: (v[0], v[1]) for k, v in row["metrics"].items()}, "setting")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    copy = Path(shutil.copytree(made, tmp_path / "run"))
    config.save(config.Config(model="scenes-dit", folder=copy), copy / "config.yaml")
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden and temporary ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture
def refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a command that must fail; returns its one line, and checks that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        before = contents(tmp_path)
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1, f"more than one line: {err!r}"
        assert err.endswith("\n")
        assert contents(tmp_path) == before
        return err.removesuffix("\n")

    return call


# -------------------------------------------------------------------------------------------- verbs


def test_help_names_every_verb(command: Command) -> None:
    code, out, err = command("--help")

    assert (code, err) == (0, "")
    named = re.findall(r"^\W*([a-z]+) +\S", out, re.MULTILINE)
    assert set(named) >= set(BUILT)


@pytest.mark.parametrize("verb", BUILT)
def test_every_verb_that_is_built_explains_itself(command: Command, verb: str) -> None:
    code, out, err = command(verb, "--help")

    assert (code, err) == (0, "")
    assert f"qsearch {verb}" in out


def test_list_names_every_plug_in_with_its_caption(command: Command) -> None:
    code, out, _ = command("list")

    assert code == 0
    listed = [line.split()[:2] for line in out.splitlines()]
    assert [pair for pair in listed if pair[0] in plugins.KINDS] == [
        [kind, name] for kind in sorted(plugins.KINDS) for name in plugins.names(kind)
    ]
    assert {("models", "scenes-dit"), ("models", "pixart-alpha"), ("devices", "h200")} <= {
        (a, b) for a, b in listed
    }
    assert [line for line in out.splitlines() if len(line.split()) < 4] == []


def test_list_of_one_kind_names_only_that(command: Command) -> None:
    _, out, _ = command("list", "metrics")

    assert [line.split()[:2] for line in out.splitlines()] == [
        ["metrics", name] for name in plugins.names("metrics")
    ]


# --------------------------------------------------------------------------------------------- show


@pytest.fixture
def narrow(
    command: Command, made: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[str]]:
    """`qsearch show FILE` in a terminal of 60 columns, as lines."""
    monkeypatch.setenv("COLUMNS", "60")

    def call(name: str) -> list[str]:
        code, out, err = command("show", made / name)
        assert (code, err) == (0, "")
        return out.splitlines()

    return call


def column(lines: list[str], index: int) -> str:
    """The cells of a column one after the other, without spaces: a cell may be broken over lines
    anywhere, but never cut.
    """
    rows = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    return "".join(row[index].strip() for row in rows).replace(" ", "")


@pytest.mark.parametrize("name", ARTEFACTS)
def test_every_artefact_fits_60_columns(narrow: Callable[[str], list[str]], name: str) -> None:
    lines = narrow(name)

    assert [line for line in lines if len(line) > 60] == []
    assert [line for line in lines if "…" in line] == []  # what is cut can't be read
    assert len(lines) > 8


def test_a_graph_is_shown_by_role(narrow: Callable[[str], list[str]]) -> None:
    roles = column(narrow("graph.json"), 0)

    assert {layer.role for layer in GRAPH if layer.role not in roles} == set()
    assert roles.endswith("all")


def test_a_plan_is_shown_layer_by_layer(narrow: Callable[[str], list[str]]) -> None:
    lines, plan = narrow("plan.json"), make_plan(GRAPH)

    assert column(lines, 0) == "".join(plan.layers)
    assert column(lines, 1) == "".join(map(str, plan.layers.values()))


def test_a_table_is_shown_with_every_layer_and_scheme(narrow: Callable[[str], list[str]]) -> None:
    lines, values = narrow("sensitivity.parquet"), make_table(GRAPH).values()

    assert column(lines, 0) == "".join(layer.name for layer in GRAPH.quantizable)
    for i, scheme in enumerate(SCHEMES):
        assert column(lines, 1 + i) == "".join(
            f"{values[layer.name][scheme]:.2e}" for layer in GRAPH.quantizable
        )


@pytest.mark.parametrize("name", ["results.json", "trials.db"])
def test_results_are_shown_with_every_number_whole(
    narrow: Callable[[str], list[str]], name: str
) -> None:
    words = " ".join(narrow(name)).split()

    expected = [
        cell(row, metric)
        for row in make_rows(GRAPH, make_plan(GRAPH))
        for metric in row["metrics"]
        if metric != "noise"
    ]
    assert {word for text in (*expected, *PLANS) for word in text.split()} - set(
        words
    ) == set()  # text breaks between its words only
    for word in ("0.950", "±", "31.5"):
        assert words.count(word) >= sum(text.split().count(word) for text in expected) > 0


# ----------------------------------------------------------------------------- mistakes in a config


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "scenes-dit", "profil": {}}, "unknown key 'profil'; did you mean 'profile'?"),
        (
            {"model": "scenes-dit", "prompts": {"count": 4}},
            "prompts: must be the path of a file; given {'count': 4}",
        ),
        (
            {"model": "scenes-dit", "profile": {"bin": 3}},
            "unknown key 'profile.bin'; did you mean 'bins'?",
        ),
        (
            {"model": "scenes-dit", "profile": {"bins": "three"}},
            "profile.bins: input should be a valid integer",
        ),
        (
            {"model": "scenes-dit", "evaluate": {"samples": 0}},
            "evaluate.samples: input should be greater than or equal to",
        ),
        (
            {"model": "scenes-dit", "profile": {"schemes": ["uint4-x"]}},
            "profile.schemes: a scheme is FORMAT",
        ),
        ({"model": "scenes-dit", "profile": {"schemes": ["unit4-c"]}}, "did you mean 'uint4'?"),
        (
            {"model": "scenes-dit", "profile": {"estimator": "sweeep"}},
            "no plug-in 'sweeep' among the estimators; did you mean 'sweep'?",
        ),
        (
            {"model": "scenes-dit", "evaluate": {"metrics": ["ssmi"]}},
            "no plug-in 'ssmi' among the metrics; did you mean 'ssim'?",
        ),
        (
            {"model": "scenes-dit", "evaluate": {"uniform": "int99"}},
            "evaluate.uniform: a scheme is FORMAT",
        ),
        (
            {"model": "scenes-dit", "allocate": {"solver": "ipl"}},
            "no plug-in 'ipl' among the solvers; did you mean 'ilp'?",
        ),
        (
            {"model": "scenes-dit", "allocate": {"bytes": 0}},
            "a budget must be above zero; bytes is 0",
        ),
        (
            {"model": "scenes-dit", "allocate": {"average_bits": -1}},
            "a budget must be above zero; average_bits is -1",
        ),
        ({"profile": {"bins": 3}}, "model: field required"),
        (
            {"model": "scenes-dit", "profile": {"metrics": ["noyse"]}},
            "profile.metrics: there is no plug-in 'noyse' among the metrics",
        ),
        (
            {"model": "scenes-dit", "profile": {"mode": "trajectory"}},
            "profile.metrics: noise is that of one call of the denoiser",
        ),
        (
            {"model": "scenes-dit", "profile": {"mode": "steps"}},
            "profile.mode: input should be 'step' or 'trajectory'",
        ),
        ({"model": "scenes-dit", 3: 4}, "3: keys should be strings"),
        (["model"], "must hold a mapping of sections, it holds list"),
        ("model: [scenes-dit\nseed: 0\n", "is not readable as YAML"),
        ("\x00", "is not readable as YAML"),
        ("", "model: field required"),
    ],
    ids=str,
)
def test_a_mistake_in_a_config_is_one_line_with_its_place(
    refused: Callable[..., str], tmp_path: Path, content: Any, message: str
) -> None:
    line = refused("run", written(tmp_path / "mine.yaml", content))

    assert line.startswith("qsearch: ")
    assert "mine.yaml" in line
    assert message in line


@pytest.mark.parametrize(
    "make",
    [lambda path: written(path / "configs.yaml", {"model": "m"}), lambda path: None],
    ids=["neighbours", "alone"],
)
def test_a_config_that_does_not_exist_is_answered_with_those_that_do(
    refused: Callable[..., str], tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path)

    line = refused("run", tmp_path / "confgis.yaml")

    assert line.startswith(f"qsearch: {tmp_path / 'confgis.yaml'} does not exist")
    assert ("did you mean" in line) == (tmp_path / "configs.yaml").exists()


@pytest.mark.parametrize("verb", ["allocate", "evaluate", "apply", "report", "export"])
def test_a_run_that_does_not_exist_is_answered_with_the_nearest(
    refused: Callable[..., str], tmp_path: Path, verb: str
) -> None:
    (tmp_path / "runs" / "big").mkdir(parents=True)
    (tmp_path / "runs" / "big" / "config.yaml").write_text("model: scenes-dit\n")
    more = ["--to", "gguf"] if verb == "export" else []

    line = refused(verb, tmp_path / "runs" / "bigxl", *more)

    assert "does not exist" in line
    assert f"did you mean '{tmp_path / 'runs' / 'big'}'" in line


@pytest.mark.parametrize("start", ["run", "extract"])
def test_an_unknown_model_is_answered_with_the_nearest_name(
    refused: Callable[..., str], tmp_path: Path, start: str
) -> None:
    arguments = (
        ("run", written(tmp_path / "mine.yaml", {"model": "scenes-dti"}))
        if start == "run"
        else ("extract", "scenes-dti", "-o", "out")
    )

    assert refused(*arguments) == (
        "qsearch: a model is a name of the zoo, a card, a local diffusers folder, a checkpoint "
        "in one file (.safetensors) or a hub id; given 'scenes-dti'; did you mean 'scenes-dit'?"
    )


def test_a_folder_without_a_pipeline_is_no_model(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()

    assert (
        "a model's folder is a whole diffusers pipeline with a model_index.json; given 'empty', "
        "which has none"
    ) in refused("extract", "empty", "-o", "out")


# ---------------------------------------------------------------------------- budgets and artefacts


@pytest.mark.parametrize("bits", ["1.0", "2", "0", "-3"])
def test_a_budget_below_what_any_choice_can_reach_is_refused(
    refused: Callable[..., str], folder: Path, bits: str
) -> None:
    line = refused("allocate", folder, "--average-bits", bits)

    if float(bits) > 0:
        least = math.ceil(1e4 * Plan.uniform(GRAPH, "uint2-c").achieved.average_bits) / 1e4
        assert line == (
            f"qsearch: no plan reaches average_bits {bits.removesuffix('.0')}; the least with "
            f"these choices is {least:.4f}"
        )
    else:
        assert "a budget must be above zero; average_bits is" in line


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("graph.json", "allocate"),
        ("sensitivity.parquet", "allocate"),
        ("graph.json", "evaluate"),
        ("plan.json", "evaluate"),
    ],
)
def test_a_truncated_artefact_is_refused_by_the_verb_that_needs_it(
    refused: Callable[..., str], folder: Path, name: str, verb: str, share: float
) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    line = refused(verb, folder)

    assert line.startswith(
        f"qsearch: {path} is not readable as {'JSON' if name.endswith('json') else 'Parquet'}, "
        "perhaps truncated ("
    )
    assert line.endswith("); make it again")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_truncated_artefact_is_not_shown(
    command: Command, folder: Path, name: str, share: float
) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    code, out, err = command("show", path)

    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("foreign.json", '{"a": 1}'),
        ("foreign.json", "[1, 2]"),
        ("foreign.json", '{"header": {"schema": "qsearch.plan/1"}}'),
        (
            "foreign.json",
            '{"header": {"schema": "qsearch.results/1", "graph": ""}, "rows": [{"plan": 3}]}',
        ),
        ("foreign.json", '{"header": {"schema": "qsearch.poem/1"}}'),
        ("foreign.json", '{"header": {"schema": "qsearch.plan/99"}}'),
        ("foreign.png", "\x89PNG"),
        ("foreign.parquet", "PAR1 it is not"),
        ("foreign.db", "not a database"),
        ("missing.json", None),
        ("missing.parquet", None),
        ("missing.db", None),
    ],
    ids=str,
)
def test_a_foreign_or_missing_file_is_not_shown(
    refused: Callable[..., str], folder: Path, name: str, content: str | None
) -> None:
    if content is not None:
        (folder / name).write_text(content, encoding="latin-1")

    assert name in refused("show", folder / name)


def test_a_run_is_shown_with_its_settings_and_files(command: Command, folder: Path) -> None:
    code, out, err = command("show", folder)

    assert code == 0, err
    for word in ("model", "scenes-dit", "sensitivity.parquet", "plan.json", "not yet"):
        assert word in out


def test_a_folder_that_is_no_run_is_not_shown_but_its_files_are_named(
    refused: Callable[..., str], folder: Path
) -> None:
    (folder / "config.yaml").unlink()

    assert "graph.json, plan.json, results.json, sensitivity.parquet, trials.db" in refused(
        "show", folder
    )


def test_one_artefact_in_the_place_of_another_is_refused_with_both_kinds(
    refused: Callable[..., str], folder: Path
) -> None:
    shutil.copy(folder / "plan.json", folder / "graph.json")

    assert refused("allocate", folder) == (
        f"qsearch: {folder / 'graph.json'} must be a qsearch.graph/2 file, its header says "
        "'qsearch.plan/2'; give the file that holds the graph"
    )


@pytest.mark.parametrize(
    ("name", "verb"), [("sensitivity.parquet", "allocate"), ("plan.json", "evaluate")]
)
def test_an_artefact_of_another_model_is_refused_with_both_graphs(
    refused: Callable[..., str], folder: Path, name: str, verb: str
) -> None:
    other = pixart(extra="mid_block.time_proj")
    make_table(other).save(
        folder / "sensitivity.parquet"
    ) if name == "sensitivity.parquet" else make_plan(other).save(folder / "plan.json")

    assert refused(verb, folder) == (
        f"qsearch: {folder / name} was made for graph {other.id}, the model here is graph "
        f"{GRAPH.id}; make it again for this model"
    )


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("graph.json", "allocate"),
        ("sensitivity.parquet", "allocate"),
        ("plan.json", "evaluate"),
        ("config.yaml", "allocate"),
    ],
)
def test_a_verb_without_the_one_before_it_says_what_is_missing(
    refused: Callable[..., str], folder: Path, name: str, verb: str
) -> None:
    (folder / name).unlink()

    assert refused(verb, folder).startswith(f"qsearch: {folder / name} does not exist")


def test_an_unknown_kind_of_plug_in_is_answered_with_the_nearest(
    refused: Callable[..., str],
) -> None:
    assert (
        refused("list", "solver")
        == "qsearch: there is nothing to list by the name of 'solver'; did you mean 'solvers'?"
    )


# ------------------------------------------------------------------------------------------ writing


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """What passes for a saved pipeline until it is loaded."""
    (tmp_path / "model" / "unet").mkdir(parents=True)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.36.0",
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "model"


def test_a_run_folder_that_can_t_be_written_is_refused(
    refused: Callable[..., str], pipeline_folder: Path, blocked_folder: Path, tmp_path: Path
) -> None:
    mine = written(
        tmp_path / "mine.yaml",
        {"model": str(pipeline_folder), "folder": str(blocked_folder / "run")},
    )

    for arguments in (("extract", pipeline_folder, "-o", blocked_folder / "run"), ("run", mine)):
        line = refused(*arguments)
        assert line.startswith(f"qsearch: cannot write {blocked_folder / 'run' / 'config.yaml'}: ")
        assert line.endswith("; give a folder with room and write permission")


def test_a_plan_that_can_t_be_written_leaves_the_old_one(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "plan.json").read_bytes()

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = command("allocate", folder, "--average-bits", "5.0")

    assert (code, err.splitlines()[-1]) == (2, err.splitlines()[-1])
    assert "No space left on device" in err
    assert (folder / "plan.json").read_bytes() == before
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


def test_a_pipeline_that_is_not_whole_is_refused(
    command: Command, pipeline_folder: Path, tmp_path: Path
) -> None:
    code, out, err = command("extract", pipeline_folder, "-o", tmp_path / "out")

    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        f"qsearch: {pipeline_folder} must hold a whole diffusers pipeline; loading it failed: "
    )
    assert not (tmp_path / "out" / "graph.json").exists()


# ----------------------------------------------------------------------------------- what goes well


def test_allocate_needs_no_model_and_says_how_to_keep_what_was_asked(
    command: Command, folder: Path
) -> None:
    code, _, err = command("allocate", folder, "--average-bits", "5.5")

    assert code == 0
    assert "is plan.before.json now" in " ".join(err.split())  # the fixture's was made by hand
    assert "allocate: 5.4" in err
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["budget"] == {"average_bits": 5.5}
    assert plan["achieved"]["average_bits"] <= 5.5
    assert config.load(folder / "config.yaml").allocate.average_bits is None
    said = " ".join(err.split())
    assert f"to keep: qsearch set {folder} allocate.average_bits=5.5" in said


@pytest.mark.parametrize("limit", [("--average-bits", "40"), ("--bytes", "100%")], ids=str)
def test_a_limit_that_allows_full_precision_is_said_and_holds_for_one_call(
    command: Command, folder: Path, limit: tuple[str, str]
) -> None:
    before = (folder / "config.yaml").read_bytes()

    code, _, err = command("allocate", folder, *limit)

    assert code == 0
    assert "no layer is quantized; a smaller plan needs a lower limit" in " ".join(err.split())
    assert set(json.loads((folder / "plan.json").read_text())["sites"].values()) == {"keep"}
    assert (folder / "config.yaml").read_bytes() == before


def test_schemes_are_a_list_with_blanks_or_one_line_says_that_there_are_none(
    command: Command, folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("qsearch.stages.announce.begin", lambda *_: None)
    monkeypatch.setattr("qsearch.stages.extract.extract", lambda *_: None)
    monkeypatch.setattr(
        "qsearch.stages.profile.profile",
        lambda job, *_: asked.append(job.config.profile.schemes),
    )

    assert command("profile", folder, "--schemes", "uint4-c, uint8-c ,")[0] == 0

    assert asked == [("uint4-c", "uint8-c")]
    assert "profile.schemes" in refused("profile", folder, "--schemes", "")


def test_a_process_of_its_own_gives_the_line_and_the_code(tmp_path: Path) -> None:
    mine = written(tmp_path / "mine.yaml", {"model": "scenes-dti"})

    done = subprocess.run(
        [sys.executable, "-m", "qsearch.cli", "run", str(mine)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qsearch: a model is a name of the zoo, a card, a local diffusers folder, a checkpoint "
        "in one file (.safetensors) or a hub id; given 'scenes-dti'; did you mean "
        "'scenes-dit'?\n"
    )


def test_a_frontier_is_plans_by_size_and_a_picture(command: Command, folder: Path) -> None:
    code, _, said = command("allocate", folder, "--frontier")

    assert code == 0, said
    paths = sorted((folder / "frontier").glob("plan-*.json"))
    plans = [Plan.load(p, GRAPH) for p in paths]
    assert f"{len(plans)} plans" in said
    assert len(plans) > 15
    assert [p.name for p in paths] == [
        f"plan-{p.budget.average_bits:.2f}.json" for p in plans if p.budget
    ]
    losses = [p.solver.objective or 0.0 for p in plans]
    assert losses == sorted(losses, reverse=True)
    picture = (folder / "frontier.svg").read_text()
    assert picture.startswith("<svg")
    assert "uint4-c" in picture
    assert "var(--" not in picture


def test_the_reasons_for_a_layer_name_every_choice_and_the_next_best(
    command: Command, folder: Path
) -> None:
    assert command("allocate", folder, "--average-bits", "6.0")[0] == 0
    layer = "transformer_blocks.0.ff.net.2"

    code, shown, _ = command("show", folder / "plan.json", "--why", layer)

    assert code == 0
    for scheme in (*SCHEMES, "keep"):
        assert scheme in shown
    assert "the next-best choice is" in shown
    assert "with 0.1 stored bits less" in shown
    assert "takes" in shown


def test_the_end_of_a_layer_s_name_does_where_no_other_ends_so(
    command: Command, folder: Path, refused: Callable[..., str]
) -> None:
    full = next(x.name for x in GRAPH.quantizable if x.name.count(".") > 2)
    parts = full.split(".")
    short = next(
        s
        for i in range(1, len(parts))
        if (s := ".".join(parts[-i:]))
        and sum(x.name == s or x.name.endswith(f".{s}") for x in GRAPH) == 1
    )

    code, out, err = command("show", folder / "plan.json", "--why", short)

    assert code == 0, err
    assert full in " ".join(out.split()).replace(" ", "")
    last = next(
        s
        for x in GRAPH.quantizable
        if sum(y.name.endswith(f".{(s := x.name.rpartition('.')[2])}") for y in GRAPH) > 1
    )
    assert "layers end in" in refused("show", folder / "plan.json", "--why", last)


def test_the_reasons_for_a_layer_that_is_none_name_the_nearest(
    refused: Callable[..., str], folder: Path
) -> None:
    assert "did you mean 'proj_out'" in refused("show", folder / "plan.json", "--why", "proj_outt")


def test_a_plan_for_a_device_keeps_its_time(command: Command, folder: Path) -> None:
    code, _, said = command("allocate", folder, "--device", "h200", "--latency", "1.0")

    assert code == 0, said
    achieved = json.loads((folder / "plan.json").read_text())["achieved"]
    assert 0 <= achieved["latency"] <= 1.0


def test_a_time_without_a_device_is_refused(refused: Callable[..., str], folder: Path) -> None:
    assert "needs allocate.device" in refused("allocate", folder, "--latency", "1.0")


@pytest.mark.parametrize(
    "words", [("--debug", "show", "nothing.json"), ("show", "nothing.json", "--debug")]
)
def test_debug_shows_where_an_error_was_raised(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)

    code, _, plain = command(*(w for w in words if w != "--debug"))
    again, _, shown = command(*words)

    assert (code, again) == (2, 2)
    assert "Traceback" not in plain
    assert "Traceback" in shown
    assert shown.strip().endswith(plain.strip().splitlines()[-1])


def test_debug_shows_no_passwords(command: Command, tmp_path: Path, graph: OpGraph) -> None:
    url = "postgresql://me:hunter2@127.0.0.1:1/trials"
    (tmp_path / "run").mkdir()
    graph.save(tmp_path / "run" / "graph.json")

    code, out, err = command("fit", tmp_path / "run", "--storage", url, "--debug")

    assert code == 2
    assert "hunter2" not in out + err
