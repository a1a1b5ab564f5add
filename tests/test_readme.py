"""The README and the pages are true: commands and configs exist, tables name what there is, the
Python gives what it says.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qsearch.core import plugins
from qsearch.stages import config
from qsearch.testing import QuantizerContract, SolverContract
from tests.docs_blocks import snippets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLUGINS = (ROOT / "docs" / "how-to" / "plug-ins.md").read_text(encoding="utf-8")


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose first column is called `head`, without its head."""
    table = text[text.index(f"| {head} |") :].partition("\n\n")[0]
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_python_runs_and_gives_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = [s for s in snippets("python") if s.page == "README.md"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(compile(block.text, "README.md", "exec"), names)

    ours, uniform = re.findall(r"([\d.]+) stored bits, SQNR ([\d.]+) dB", capsys.readouterr().out)
    assert 4 < float(ours[0]) <= 5.0
    assert float(ours[1]) > float(uniform[1]) > 10
    assert {layer.name for layer in names["graph"].quantizable} == set(names["table"].values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[\w/-]+\.yaml", README))))
def test_every_config_that_is_named_exists(path: str) -> None:
    assert config.load(ROOT / path).model


def test_the_first_two_blocks_are_the_two_commands() -> None:
    job, tests = [s.text for s in snippets("bash") if s.page == "README.md"][:2]

    assert "pip install -q -e . -c constraints.txt" in job
    assert "qsearch run configs/scenes-dit.yaml" in job
    assert tests.splitlines()[-1] == "bash tests/run.sh"
    assert (ROOT / "tests" / "run.sh").exists()
    assert (ROOT / "constraints.txt").exists()


def test_every_kind_of_plug_in_that_can_be_added_has_its_folder_and_its_functions() -> None:
    added = rows(PLUGINS, "to add a")
    assert len(added) >= len(plugins.KINDS)

    for _, path, provides in added:
        folder = ROOT / path.strip("`").rpartition("/")[0]
        kind = next(
            (k for k, p in plugins.KINDS.items() if folder == ROOT / p.replace(".", "/")), None
        )
        assert folder.is_dir()
        functions = [part.partition("(")[0] for part in re.findall(r"`([^`]+)`", provides)]
        assert functions
        for name in plugins.names(kind) if kind else []:
            assert [f for f in functions if not hasattr(plugins.load(str(kind), name), f)] == [], (
                f"{kind}: {name}"
            )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_of_the_readme_leads_to_a_file(path: str) -> None:
    assert (ROOT / path).exists()


def example(caption: str) -> ModuleType:
    """The plug-in on the page whose docstring begins so."""
    page = "docs/how-to/plug-ins.md"
    [text] = [s.text for s in snippets("python") if s.text.startswith(f'"""{caption}')]
    module = ModuleType("example")
    exec(compile(text, page, "exec"), module.__dict__)
    return module


class TestTheQuantizerOfThePage(QuantizerContract):
    plugin = example("The whole range of each group")


class TestTheSolverOfThePage(SolverContract):
    plugin = example("The cheapest choice of every site")
