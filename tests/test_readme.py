"""The README is true: its Python runs, its commands and options exist, its tables name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from qsearch import cli
from qsearch.core import plugins
from qsearch.stages import config
from qsearch.zoo.recipes import RECIPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS: dict[str, click.Command] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text below a heading."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_python_runs_and_gives_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = blocks("python")[
        0
    ]  # those under Exports are run with their tools, in tests/execute/test_export_readme.py
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(compile(block, "README.md", "exec"), names)

    bits, status = capsys.readouterr().out.split()
    assert status == "optimal"
    assert 4 < float(bits) <= 5.0
    assert {layer.name for layer in names["graph"].quantizable} == set(names["table"].values())
    assert list(tmp_path.iterdir()) == []


def test_every_command_in_the_table_exists_with_its_options() -> None:
    found = [row[0].strip("`") for row in rows("From the shell")]
    assert len(found) >= 7

    for command in found:
        program, verb, *rest = shlex.split(command)
        assert program == "qsearch"
        assert verb in VERBS, command
        known = {option for parameter in VERBS[verb].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known, command


def test_every_verb_is_in_the_table() -> None:
    assert {shlex.split(row[0].strip("`"))[1] for row in rows("From the shell")} == set(VERBS)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"configs/[\w-]+\.yaml", README))))
def test_every_config_that_is_named_exists(path: str) -> None:
    assert config.load(ROOT / path).model


def test_the_first_two_blocks_are_the_two_commands() -> None:
    job, tests = blocks("bash")[:2]

    assert "pip install -q -e . -c constraints.txt" in job
    assert "qsearch run configs/scenes-dit.yaml" in job
    assert tests.splitlines()[-1] == "bash tests/run.sh"
    assert (ROOT / "tests" / "run.sh").exists()
    assert (ROOT / "constraints.txt").exists()


def test_every_kind_of_plug_in_that_can_be_added_has_its_folder_and_its_functions() -> None:
    added = rows("How to add")
    assert len(added) >= 5

    for _, path, provides in added:
        folder = ROOT / path.strip("`").rpartition("/")[0]
        kind = next(
            k for k, package in plugins.KINDS.items() if folder == ROOT / package.replace(".", "/")
        )
        functions = [part.partition("(")[0] for part in re.findall(r"`([^`]+)`", provides)]
        assert functions
        for name in plugins.names(kind):
            assert [f for f in functions if not hasattr(plugins.load(kind, name), f)] == [], (
                f"{kind}: {name}"
            )


def test_every_format_that_is_said_to_be_built_is_built() -> None:
    from qsearch.core.scheme import FORMATS, Scheme

    sentence = re.search(r"Formats: (.*?); methods", section("Schemes"), re.DOTALL)
    assert sentence is not None
    ranges = re.findall(r"`(\w+?)(\d)`–`\1(\d)`", sentence[1])
    said = {
        f"{family}{bits}" for family, low, high in ranges for bits in range(int(low), int(high) + 1)
    } | set(re.findall(r"`(\w+)`", sentence[1]))
    methods = [plugins.load("quantizers", name) for name in plugins.names("quantizers")]
    assert said == {
        f for f in FORMATS if f != "keep" and any(m.supports(Scheme.parse(f)) for m in methods)
    }


def test_the_zoo_is_trained_by_the_parts_that_there_are() -> None:
    found = re.search(
        r"for part in ([\w -]+); do python -m qsearch\.zoo\.train \$part", section("The zoo")
    )

    assert found is not None
    assert sorted(found[1].split()) == sorted(RECIPES)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_to_a_file(path: str) -> None:
    assert (ROOT / path).exists()
