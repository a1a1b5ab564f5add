"""Plug-ins: the file is the registration, and only what is used is imported."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from qsearch.core import plugins
from qsearch.core.errors import QSearchError


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of somebody's own solvers: `fine`, and `broken`, which can't even be imported."""
    (tmp_path / "fine.py").write_text('"""Solves everything.\n\nSlowly."""\n\nANSWER = 42\n')
    (tmp_path / "broken.py").write_text(
        '"""Never imported by accident."""\n\nraise RuntimeError("imported")\n'
    )
    (tmp_path / "_helper.py").write_text("")
    package = importlib.import_module(plugins.KINDS["solvers"])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    yield tmp_path
    for name in ("fine", "broken"):
        sys.modules.pop(f"{package.__name__}.{name}", None)


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_kind_is_a_folder_whose_files_are_its_names(kind: str) -> None:
    folder = Path(str(importlib.import_module(plugins.KINDS[kind]).__file__)).parent

    stems = sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))
    assert set(plugins.names(kind)) >= set(stems)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]
)
def test_every_plug_in_has_a_caption(kind: str, name: str) -> None:
    assert plugins.caption(kind, name).strip()


def test_a_dropped_file_is_found_and_loaded_without_importing_its_neighbours(dropped: Path) -> None:
    assert {"fine", "broken"} <= set(plugins.names("solvers"))
    assert plugins.load("solvers", "fine").ANSWER == 42
    assert "qsearch.decide.solvers.broken" not in sys.modules


def test_a_file_that_begins_with_an_underscore_is_no_plug_in(dropped: Path) -> None:
    assert "_helper" not in plugins.names("solvers")
    with pytest.raises(QSearchError, match="no plug-in '_helper' among the solvers"):
        plugins.load("solvers", "_helper")


def test_a_caption_is_read_without_running_the_plug_in(dropped: Path) -> None:
    assert plugins.caption("solvers", "fine") == "Solves everything."
    assert plugins.caption("solvers", "broken") == "Never imported by accident."
    assert "qsearch.decide.solvers.fine" not in sys.modules


def test_an_error_inside_a_plug_in_is_not_mistaken_for_a_missing_one(dropped: Path) -> None:
    with pytest.raises(RuntimeError, match="imported"):
        plugins.load("solvers", "broken")


def test_names_import_no_plug_in() -> None:
    script = (
        "import sys; from qsearch.core import plugins\n"
        "found = [f'{plugins.KINDS[k]}.{n}' for k in plugins.KINDS for n in plugins.names(k)]\n"
        "print([name for name in found if name in sys.modules])"
    )

    assert (
        subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


def test_an_unknown_name_is_answered_with_the_nearest(dropped: Path) -> None:
    with pytest.raises(
        QSearchError, match=r"no plug-in 'finne' among the solvers; did you mean 'fine'\?"
    ):
        plugins.load("solvers", "finne")


def test_an_unknown_kind_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        QSearchError, match=r"no kind of plug-in 'solver'; did you mean 'solvers'\?"
    ):
        plugins.names("solver")


def entry_points(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """As if an installed distribution had registered the solver `outside` at `value`."""
    entry = metadata.EntryPoint("outside", value, "qsearch.solvers")
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [entry] if group == "qsearch.solvers" else []
    )


def test_an_entry_point_is_a_plug_in_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("outsiders_solver", "Solves from outside.")
    monkeypatch.setitem(sys.modules, "outsiders_solver", module)
    entry_points(monkeypatch, "outsiders_solver")

    assert "outside" in plugins.names("solvers")
    assert plugins.load("solvers", "outside") is module
    assert plugins.caption("solvers", "outside") == "Solves from outside."


def test_an_entry_point_that_is_no_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, "math:pi")

    with pytest.raises(
        QSearchError, match=r"'outside' of qsearch\.solvers must name a module, it names float"
    ):
        plugins.load("solvers", "outside")
