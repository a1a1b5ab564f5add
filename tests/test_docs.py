"""Every block of README and docs runs, page by page in a folder with two runs; those that do not
say why, and still parse.
"""

from __future__ import annotations

import runpy
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from torch import nn

from qsearch import Plan, zoo
from qsearch.cli import commands
from qsearch.core import plugins
from qsearch.core.graph import OpGraph
from qsearch.execute.contracts import graph_of
from qsearch.stages import config
from tests.docs_blocks import PAGES, ROOT, Snippet, by_page, snippets
from tests.execute.exporting import needs

SCHEMES = ("uint4-c", "keep", "uint8-c", "uint3-c")
#: pages of tools that watch a whole call before they export, or compile a C++ extension
SLOW = ("onnx", "openvino", "modelopt", "quanto")
#: modules of tools that are too large to be wanted of everybody who develops
LARGE = ("modelopt", "openvino", "auto_round", "sdnq", "onnxruntime", "optimum")
RUNNING = by_page()
VERBS: dict[str, click.Command] = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]


@cache
def _graph(name: str) -> OpGraph:
    return graph_of(zoo.folder(name))


def runs(folder: Path) -> None:
    """runs/scenes-dit and runs/scenes-unet as the main job leaves them, as far as pages look at
    them.
    """
    for name in ("scenes-dit", "scenes-unet"):
        graph = _graph(name)
        run = folder / "runs" / name
        config.save(config.Config(model=name, folder=Path("runs") / name), run / "config.yaml")
        OpGraph(name, graph.layers).save(run / "graph.json")
        chosen = [SCHEMES[i % len(SCHEMES)] for i in range(len(graph.layers))]
        Plan.make(
            graph, {layer.name: scheme for layer, scheme in zip(graph, chosen, strict=True)}
        ).save(run / "plan.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run of scenes-dit, measured to the end."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "scenes-dit",
                "folder": "runs/scenes-dit",
                "sampling": {"steps": 2, "batch": 3},
                "profile": {
                    "schemes": ["uint4-c", "uint8-c"],
                    "samples": 2,
                    "batch": 1,
                    "bins": 1,
                    "probes": 2,
                },
                "allocate": {"average_bits": 5.0},
                "evaluate": {"samples": 3, "metrics": ["sqnr"]},
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(["qsearch", "run", "small.yaml"], patch)
    return folder


def call(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """A command; it must end with 0."""
    patch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert not stop.value.code, words


def play(snippet: Snippet, names: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Run a block."""
    if snippet.language == "bash":
        for words in snippet.commands():
            call(words, patch)
    else:
        code = "\n" * snippet.line + snippet.text
        exec(compile(code, snippet.page, "exec"), names)


GUIDES = {page: held for page, held in RUNNING.items() if not page.startswith("docs/how-to/tools/")}
TOOLS = {page: held for page, held in RUNNING.items() if page not in GUIDES}


@pytest.mark.parametrize("page", GUIDES)
def test_the_blocks_of_a_page_run(
    page: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}

    for snippet in GUIDES[page]:
        play(snippet, names, monkeypatch)


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if Path(p).stem in SLOW else ()) for p in TOOLS],
)
def test_the_blocks_of_a_tool_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    monkeypatch.chdir(tmp_path)
    runs(tmp_path)
    names: dict[str, Any] = {}

    for snippet in TOOLS[page]:
        for words in snippet.commands() if snippet.language == "bash" else []:
            needs(words[words.index("--to") + 1])
        if page.endswith("autoround.md") and snippet.language == "python":
            pytest.importorskip("auto_round")  # diffusers says that it is missing in its own way
        try:
            play(snippet, names, monkeypatch)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in LARGE:
                raise
            pytest.skip(f"{error.name} not installed")

    model = names.get("model", nn.Module())
    assert isinstance(getattr(model, "_wrapped", model), nn.Module)  # quanto wraps what it loads
    assert {"model", "config", "policy", "session"} & set(names)


def test_every_exporter_has_a_page_with_its_command() -> None:
    told = {
        words[words.index("--to") + 1]
        for held in TOOLS.values()
        for s in held
        for words in s.commands()
    }

    assert told == set(plugins.names("exporters", outside=False))


@pytest.mark.parametrize("snippet", snippets("bash"), ids=lambda s: f"{s.page}:{s.line}")
def test_every_command_exists_with_its_options(snippet: Snippet) -> None:
    for _, *words in snippet.commands():
        verb = words[0]
        assert verb in VERBS, words
        known = {o for p in VERBS[verb].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {w for w in words if w.startswith("-")} <= known, words


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=lambda s: f"{s.page}:{s.line}")
def test_every_config_on_a_page_is_one(snippet: Snippet) -> None:
    content = {"model": "scenes-dit"} | yaml.safe_load(snippet.text)

    assert config.parse(content, snippet.page).model


def test_a_block_that_is_not_run_says_why() -> None:
    for snippet in snippets("bash", "python"):
        assert snippet.reason == "" or len(snippet.reason) > 20, f"{snippet.page}:{snippet.line}"


def test_blocks_are_found_and_a_broken_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(PAGES) > 20
    assert sum(map(len, RUNNING.values())) > 20
    broken = Snippet("page.md", 1, "python", "x = 1\nx.missing\n", "")
    with pytest.raises(AttributeError):
        play(broken, {}, monkeypatch)
    wrong = Snippet("page.md", 1, "bash", "qsearch allocate --nonsense\n", "")
    with pytest.raises(AssertionError):
        play(wrong, {}, monkeypatch)


def test_the_tables_of_the_readme_are_what_their_script_makes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    assert runpy.run_path(str(ROOT / "docs" / "readme.py"))["page"](text) == text, (
        "run `python docs/readme.py`"
    )


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_numbers_in_a_page_s_sentences_are_those_of_its_json(page: Path) -> None:
    values = runpy.run_path(str(ROOT / "docs" / "readme.py"))["with_values"]
    text = page.read_text(encoding="utf-8")

    assert values(text, ROOT) == text, "run `python docs/readme.py`"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192
