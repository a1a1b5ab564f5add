"""Figures' JSON: each is of one documented command, on one commit."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks" / "figures"
sys.path.insert(0, str(FOLDER))
import all as figures  # noqa: E402

PACKAGES = ("qsearch", "qsearch_kernels", "tests")
KNOWN = {made.name: made for made in figures.FIGURES}
HELD = sorted(p.stem for p in FOLDER.glob("*.json"))
#: made before a JSON said its commit, by other options, or in parts: to be made again; a name
#: leaves the list with its new JSON
OLD = set(
    """
    codes_plans-scenes-dit-weights compiled-100 compiled-120 explanations
    probes-scenes-dit-trajectory probes-scenes-unet-activations probes-scenes-unet-trajectory
    quick sizes surrogates
    """.split()
)


@pytest.mark.parametrize("name", HELD)
def test_a_json_is_of_its_command_and_of_one_commit(name: str) -> None:
    assert name in KNOWN, "notebooks/figures/all.py does not make it"
    said = figures.wrong(KNOWN[name])
    assert bool(said) == (name in OLD), said or "it is in order: take it off the list OLD"


@pytest.mark.parametrize("name", sorted({m.words.split()[0] for m in figures.FIGURES}))
def test_a_command_has_only_options_that_its_script_documents(name: str) -> None:
    said = ast.get_docstring(ast.parse((FOLDER / name).read_text("utf-8"))) or ""
    for made in figures.FIGURES:
        script, *words = made.words.split()
        if script == name:
            for word in words:
                assert not word.startswith("--") or word in said, (made.command, word)


def names_that_are_gone(script: str) -> list[str]:
    """What `script` imports from the package, the kernels and the tests, and they don't have."""
    gone = []
    for node in ast.walk(ast.parse((FOLDER / script).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            module = importlib.import_module(str(node.module))
            for name in (alias.name for alias in node.names):
                inner = f"{node.module}.{name}"
                if not hasattr(module, name) and importlib.util.find_spec(inner) is None:
                    gone.append(inner)
    return gone


@pytest.mark.parametrize("script", sorted(p.name for p in FOLDER.glob("*.py")))
def test_a_script_imports_only_what_there_is(script: str) -> None:
    assert names_that_are_gone(script) == []


def test_names_are_of_one_command_each() -> None:
    assert len(KNOWN) == len(figures.FIGURES)


def test_places_do_not_matter_and_other_options_do() -> None:
    bare = figures.bare
    assert bare("python a.py --folder /tmp/x --samples 3") == "python a.py --samples 3"
    assert bare("python a.py --samples 3") != bare("python a.py --samples 4")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"commit": "0123456789ab+"}, "made of commit 0123456789ab+"),
        ({"commit": None}, "made of commit None"),
        ({"command": "python notebooks/figures/rooms.py --before x"}, "made by python"),
    ],
)
def test_a_json_of_a_changed_tree_or_another_command_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], said: str
) -> None:
    monkeypatch.setattr(figures, "HERE", tmp_path)
    right = {"command": "python notebooks/figures/rooms.py", "commit": "0123456789ab"}
    (tmp_path / "rooms.json").write_text(json.dumps(right))
    assert figures.wrong(KNOWN["rooms"]) == ""
    (tmp_path / "rooms.json").write_text(json.dumps({**right, **change}))
    assert figures.wrong(KNOWN["rooms"]).startswith(said)
    assert figures.wrong(KNOWN["zoo"]) == "there is none"


def test_the_list_says_what_each_takes_and_how_it_stands() -> None:
    made = subprocess.run(
        [sys.executable, str(FOLDER / "all.py"), "--list", "rooms"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "min  python notebooks/figures/rooms.py" in made.stdout
