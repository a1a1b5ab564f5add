"""Names of before 0.2.0 are there, with a word of what took their place."""

from __future__ import annotations

import importlib
import sys

import pytest

import qsearch
from qsearch import _MOVED
from qsearch.core import plan
from qsearch.core.cost import select
from qsearch.execute import runtime
from qsearch.measure import quantized_weights, simulation


@pytest.mark.parametrize(
    ("old", "new"), [("BitPlan", "Plan"), ("StepPlan", "Plan"), ("allocate_steps", "allocate")]
)
def test_a_renamed_name_is_what_took_its_place(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"qsearch\.{old} is qsearch\.{new} since 0\.2\.0"):
        assert getattr(qsearch, old) is getattr(qsearch, new)


def test_names_that_left_a_module_are_found_from_there() -> None:
    with pytest.warns(DeprecationWarning, match=r"select is in qsearch\.core\.cost"):
        assert plan.select is select
    with pytest.warns(DeprecationWarning, match="StepPlan is Plan"):
        assert plan.StepPlan is qsearch.Plan
    with pytest.warns(DeprecationWarning, match=r"is in qsearch\.measure\.quantized_weights since"):
        assert simulation.calibrated_weights is quantized_weights.calibrated_weights


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("config", "stages.config", "parse"),
        ("job", "stages.folder", "Run"),
        ("pipeline", "stages.run", "run"),
    ],
)
def test_a_moved_module_has_what_the_one_in_its_place_has(old: str, new: str, name: str) -> None:
    sys.modules.pop(f"qsearch.{old}", None)

    with pytest.warns(DeprecationWarning, match=rf"qsearch\.{old} is qsearch\.{new} since"):
        moved = importlib.import_module(f"qsearch.{old}")

    now = importlib.import_module(f"qsearch.{new}")
    assert getattr(moved, name) is getattr(now, name)
    assert now.__spec__ is not None
    assert now.__spec__.name == f"qsearch.{new}"


@pytest.mark.parametrize(
    ("module", "old", "name"),
    [
        ("measure.campaign", "Campaign", "EvaluationTask"),
        ("measure.clean", "Clean", "PredictedX0"),
        ("measure.question", "Question", "EstimationTask"),
        ("measure.question", "Answer", "PartialResult"),
    ],
)
def test_what_plug_ins_import_has_its_old_name_in_the_old_module(
    module: str, old: str, name: str
) -> None:
    sys.modules.pop(f"qsearch.{module}", None)
    now = importlib.import_module(_MOVED[f"qsearch.{module}"])

    with pytest.warns(DeprecationWarning, match=rf"qsearch\.{module} is "):
        moved = importlib.import_module(f"qsearch.{module}")

    assert getattr(moved, old) is getattr(now, name)
    assert not hasattr(now, old)


def test_a_warning_has_its_old_name() -> None:
    with pytest.warns(DeprecationWarning, match="is DequantizeFallbackWarning since"):
        assert runtime.WidenedWarning is runtime.DequantizeFallbackWarning


def test_a_name_that_never_was_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bitplan'"):
        qsearch.Bitplan  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("qsearch.stepwise")
