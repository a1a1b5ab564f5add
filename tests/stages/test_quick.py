"""allocate --quick: a guess from a model's files alone, and said to be one."""

from __future__ import annotations

import pytest
import torch

from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.measure.quick import relative_errors
from qsearch.stages.config import Config
from qsearch.stages.extract import extract
from qsearch.stages.folder import Run
from qsearch.stages.quick import quick
from tests import tiny_pipelines


class Told:
    """Progress that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def track(self, title: str, total: int):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        return nullcontext(lambda count: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("quick")
    torch.manual_seed(0)
    tiny_pipelines.build("flux").save_pretrained(folder / "pipe")
    config = Config(model=str(folder / "pipe"), folder=folder / "run", offload="disk")
    return Run(config, Told())  # type: ignore[arg-type]


def test_a_guess_keeps_the_budget_and_says_that_nothing_was_measured(run: Run) -> None:
    graph = extract(run)
    plan = quick(run, graph)

    assert plan.achieved.average_bits <= 4.0
    assert len({str(s) for s in plan.schemes}) > 1
    assert Plan.load(run.path("plan.json"), graph).id == plan.id
    assert not run.path("sensitivity.parquet").exists()
    lines = run.progress.lines  # type: ignore[attr-defined]
    assert any("a guess" in line and "nothing was measured" in line for line in lines)


def test_what_looks_at_inputs_is_not_guessed(run: Run) -> None:
    profile = run.config.profile.model_copy(update={"schemes": ("int8-c+a8",)})
    other = Run(run.config.model_copy(update={"profile": profile}), Told())  # type: ignore[arg-type]

    with pytest.raises(QSearchError, match=r"a guess goes by weights alone; int8-c\+a8"):
        quick(other, extract(run))


def test_some_rows_of_a_weight_stand_for_all() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4096, 1024)
    layer = LayerSpec("l", "other", "linear", (4096, 1024), 1)
    schemes = [Scheme.parse("uint4-c"), Scheme.parse("keep")]

    some = relative_errors(weight, layer, schemes)
    all_ = relative_errors(weight[:1024], layer, schemes)

    assert some[schemes[0]] == pytest.approx(all_[schemes[0]], rel=0.02)
    assert some[schemes[1]] == 0.0
