"""The notebooks run on the zoo as they stand, show pictures first, and each is the same as a script
and as a notebook.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from qsearch.core.plan import Plan
from qsearch.stages.config import load
from qsearch.zoo import PIPELINES

FOLDER = Path(__file__).parent.parent / "notebooks"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))
EACH = pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if "video" in path.stem else ())
        for path in SCRIPTS
    ],
)
Names = dict[str, Any]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the notebooks, whose runs are made once for all of them."""
    folder = tmp_path_factory.mktemp("notebooks")
    for path in [*SCRIPTS, FOLDER / "small.yaml"]:
        shutil.copy(path, folder)
    return folder


def play(script: Path) -> tuple[Names, list[Any]]:
    """Run a script as a notebook would: the names it leaves, and what the last expression of each
    cell shows.
    """
    shown: list[Any] = []
    names: Names = {"_show": shown.append, "__name__": "__main__"}
    for cell in re.split(r"^# %%.*\n", script.read_text(encoding="utf-8"), flags=re.MULTILINE):
        tree = ast.parse(cell)
        if tree.body and isinstance(last := tree.body[-1], ast.Expr):
            tree.body[-1] = ast.Expr(ast.Call(ast.Name("_show", ast.Load()), [last.value], []))
        exec(compile(ast.fix_missing_locations(tree), str(script), "exec"), names)
    return names, shown


def is_best(names: Names) -> bool:
    return (
        isinstance(names["plan"], Plan)
        and names["plan"].solver.status == "optimal"
        and names["plan"].achieved.average_bits <= 4.0
    )


#: notebook -> how many figures it shows at least, and what must hold of the names that it leaves
PROMISED: dict[str, tuple[int, Callable[[Names], bool]]] = {
    "00_tour": (
        2,
        lambda n: is_best(n) and len(n["rows"]) == 4 and n["run"].path("report.html").is_file(),
    ),
    "01_graph": (
        2,
        lambda n: (
            abs(float(n["shares"][0].seconds) / n["total"]) <= 1
            and set(n["layers"]["role"]) == {x.role for x in n["graph"]}
        ),
    ),
    "02_sensitivity": (
        5,
        lambda n: n["table"].reliability() > 0.5 and len(n["means"]) == len(n["graph"].quantizable),
    ),
    "03_explain_dit_vs_unet": (
        3,
        lambda n: (
            abs(n["layers"]["value"].sum() - n["layers"]["prediction"].iloc[0]) < 1e-9
            and len(n["plans"]) == 40
        ),
    ),
    "04_allocate": (
        2,
        lambda n: (
            is_best(n)
            and all(
                p.solver.objective >= n["plan"].solver.objective * (1 - 1e-9)
                for p in n["plans"].values()
            )
        ),
    ),
    "05_run_and_export": (
        1,
        lambda n: float(n["difference"]) < 1e-4 and len(n["rounded"]) > 3 and is_best(n),
    ),
    "06_steps": (
        1,
        lambda n: (
            n["plans"]["two ranges of steps"].solver.objective
            <= n["plans"]["the same in all steps"].solver.objective * (1 + 1e-9)
            and len(n["plan"].steps.members(8)) == 2
        ),
    ),
    "07_video": (
        2,
        lambda n: (
            len(n["differ"]) > 0
            and n["full"].pictures.shape[1:] == (15, 3, 64, 64)
            and all(m in f for f in n["found"].values() for m in ("temporal", "motion"))
        ),
    ),
}


@EACH
def test_a_notebook_runs_and_keeps_its_promise(
    script: Path, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, holds = PROMISED[script.stem]
    monkeypatch.chdir(desk)

    names, shown = play(desk / script.name)

    assert len([x for x in shown if isinstance(x, Figure)]) >= figures
    assert [
        type(x).__name__ for x in shown if x is None
    ] == []  # a cell that ends in an expression shows something
    assert holds(names)


@EACH
def test_a_reader_sees_a_picture_before_code(script: Path) -> None:
    [first, *_] = re.split(
        r"^# %%\n", script.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE
    )

    pictures = re.findall(r"^# !\[[^\]]{10,}\]\(([^)]+)\)$", first, re.MULTILINE)
    assert pictures
    for name in pictures:
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG")
        assert (FOLDER / name).stat().st_size < 400_000


@EACH
def test_a_notebook_has_one_knob_and_it_stands_at_the_zoo(script: Path) -> None:
    knobs = re.findall(
        r"^(MODELS?) = (.*?)  # the one knob: ", script.read_text(encoding="utf-8"), re.MULTILINE
    )

    assert len(knobs) == 1
    given = ast.literal_eval(knobs[0][1])
    assert set([given] if isinstance(given, str) else given) <= set(PIPELINES)


def test_the_settings_of_the_notebooks_are_a_config() -> None:
    assert load(FOLDER / "small.yaml").profile.estimator == "probe"


def test_every_script_has_its_notebook_and_a_promise() -> None:
    assert (
        [p.stem for p in sorted(FOLDER.glob("*.ipynb"))]
        == [p.stem for p in SCRIPTS]
        == list(PROMISED)
    )


def cells(path: Path) -> list[tuple[str, str]]:
    """(type, source) of each cell."""
    import jupytext

    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


@EACH
def test_the_pair_agrees(script: Path, tmp_path: Path) -> None:
    """After a change: `jupytext --update --to ipynb notebooks/*.py`, then `python
    docs/run_notebooks.py`.
    """
    notebook = script.with_suffix(".ipynb")

    assert cells(notebook) == cells(script)
    changed = tmp_path / notebook.name
    changed.write_text(
        notebook.read_text(encoding="utf-8").replace("the one knob", "a knob"), encoding="utf-8"
    )
    assert cells(changed) != cells(script)


@EACH
def test_a_notebook_holds_outputs_that_are_small_and_no_count(script: Path) -> None:
    """That they are those of its code is seen when the site is built (`tests/test_site.py`)."""
    path = script.with_suffix(".ipynb")
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]

    assert [cell for cell in code if cell.get("outputs")]
    assert [cell for cell in code if cell.get("execution_count")] == []
    assert path.stat().st_size < 200_000


def test_a_bare_expression_is_shown_and_a_broken_notebook_fails(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x = 1\nx + 1\n")
    (tmp_path / "bad.py").write_text("x = 1\nx.missing\n")

    assert play(tmp_path / "good.py")[1] == [2]
    with pytest.raises(AttributeError):
        play(tmp_path / "bad.py")
