"""Every surrogate keeps the contract of its kind, and the contract rejects ones that are wrong on
purpose.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsearch.core import plugins
from qsearch.learn.contracts import SurrogateContract
from qsearch.learn.surrogates import ridge, xgboost


@pytest.mark.parametrize("name", plugins.names("surrogates"))
@pytest.mark.parametrize("test", [n for n in dir(SurrogateContract) if n.startswith("test_")])
def test_every_surrogate_keeps_its_contract(name: str, test: str) -> None:
    getattr(type("Contract", (SurrogateContract,), {"plugin": name})(), test)()


def broken(base: Any, **methods: Any) -> types.ModuleType:
    """`base` with some methods of its models replaced."""
    module = types.ModuleType("broken")

    def fit(data: Any, target: Any, seed: int) -> Any:
        model = base.fit(data, target, seed)
        for name, method in methods.items():
            setattr(model, name, types.MethodType(method, model))
        return model

    module.__dict__.update(needs_graph=False, load=base.load, fit=fit)
    return module


def check(module: types.ModuleType, test: str) -> None:
    getattr(type("Contract", (SurrogateContract,), {"plugin": module})(), test)()


@pytest.mark.parametrize("base", [ridge, xgboost])
def test_shares_that_forget_a_column_are_rejected(base: Any) -> None:
    def shares(self: Any, data: Any) -> Any:
        values, start = type(self).shares(self, data)
        values[:, np.abs(values).sum(0).argmax()] *= 1 + 1e-4
        return values, start

    with pytest.raises(AssertionError, match="off by"):
        check(broken(base, shares=shares), "test_what_it_shares_out_adds_up_to_its_prediction")


def test_a_surrogate_that_always_says_the_mean_is_rejected() -> None:
    with pytest.raises(AssertionError, match=r"Spearman 0\.000"):
        check(
            broken(ridge, predict=lambda self, data: np.zeros(len(data))),
            "test_it_ranks_plans_that_it_has_not_seen",
        )


def test_a_surrogate_that_rolls_dice_is_rejected() -> None:
    dice = np.random.default_rng()

    with pytest.raises(AssertionError, match="they differ"):
        check(
            broken(ridge, predict=lambda self, data: dice.normal(size=len(data))),
            "test_the_same_seed_gives_the_same_predictions",
        )


def test_a_surrogate_that_saves_a_pickle_is_rejected() -> None:
    def save(self: Any, folder: Path) -> None:
        (folder / "model.pkl").write_bytes(b"")

    with pytest.raises(AssertionError, match=r"unexpected files \['\.pkl'\]"):
        check(broken(ridge, save=save), "test_it_comes_back_from_disk_without_pickles")
