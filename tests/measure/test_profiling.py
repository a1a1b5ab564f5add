"""profile: the sweep equals a loop by hand, and a killed one goes on where it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure import profiling
from qsearch.measure.pipelines import Call
from tests.models import PlainDenoiser, plain, plain_calls

SCHEMES = ("uint2-c", "uint8-c")
profile = partial(profiling.profile, estimator="sweep")
Case = tuple[PlainDenoiser, OpGraph]


@pytest.fixture
def case() -> Case:
    """A denoiser and its graph."""
    return plain()


def estimates(table: SensitivityTable) -> dict[tuple[str, str, int], float]:
    return {
        (r["site"], r["scheme"], r["step"]): r["estimate"] for r in table.frame.to_dict("records")
    }


def by_hand(
    model: nn.Module, graph: OpGraph, calls: list[Call]
) -> dict[tuple[str, str, int], float]:
    """Change one weight, run, compare, put it back."""
    found = {}
    with torch.no_grad():
        references = [model(**call.kwargs) for call in calls]
        for layer in graph:
            weight = model.get_submodule(layer.name).weight
            own = weight.detach().clone()
            for scheme in SCHEMES:
                weight.copy_(quantize(own, Scheme.parse(scheme)).dequantize())
                for i, (call, reference) in enumerate(zip(calls, references, strict=True)):
                    found[layer.name, scheme, i] = float(
                        (model(**call.kwargs) - reference).square().sum() / reference.square().sum()
                    )
                weight.copy_(own)
    return found


def test_the_sweep_equals_a_loop_by_hand(case: Case) -> None:
    model, graph = case
    calls = plain_calls()

    table = profile(model, graph, SCHEMES, calls)

    expected = by_hand(model, graph, calls)
    assert len(expected) == len(graph.quantizable) * 2 * 2
    assert estimates(table) == pytest.approx(expected, rel=1e-5)  # sums in fp64 there, in fp32 here


def test_every_row_says_how_it_was_measured(case: Case) -> None:
    model, graph = case

    frame = profile(model, graph, SCHEMES, plain_calls(), seed=7).frame

    assert set(frame["metric"]) == {"noise"}
    assert set(frame["estimator"]) == {"sweep"}
    assert set(frame["seed"]) == {7}
    assert (frame["error"] > 0).all()
    assert (frame["error"] < frame["estimate"]).all()


def test_fewer_bits_cost_more_at_every_layer(case: Case) -> None:
    model, graph = case

    values = profile(model, graph, SCHEMES, plain_calls()).values()

    # A channel of one weight is its own range: any number of bits holds it.
    assert {n: v["uint2-c"] > 100 * v["uint8-c"] for n, v in values.items()} == {
        n: graph.layer(n).weight_shape[1] > 1 for n in values
    }


def test_the_floor_lies_far_below_every_choice(case: Case) -> None:
    model, graph = case

    table = profile(model, graph, SCHEMES, plain_calls())

    assert (table.frame["floor"] < 1e-10).all()  # fp32 rounding, squared
    assert len(table.at_floor()) == 0


def test_the_model_is_left_as_it_was(case: Case) -> None:
    model, graph = case
    before = {k: v.clone() for k, v in model.state_dict().items()}

    profile(model, graph, SCHEMES, plain_calls())

    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == []


class Killed(Exception):
    """What stands for SIGKILL here: nothing after it runs."""


def interrupted(case: Case, partial: Path, after: int, key: str = "k") -> None:
    """Profile, and stop after that many choices have been measured and saved."""
    model, graph = case

    def stop(done: int, total: int) -> None:
        if done > after:
            raise Killed

    with pytest.raises(Killed):
        profile(model, graph, SCHEMES, plain_calls(), partial=partial, key=key, progress=stop)


def resumed(case: Case, partial: Path, key: str = "k") -> tuple[SensitivityTable, list[int], int]:
    """The table of a second start, what progress it reported, and how often the denoiser ran."""
    model, graph = case
    told: list[int] = []
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = model.register_forward_hook(count)
    table = profile(
        model,
        graph,
        SCHEMES,
        plain_calls(),
        partial=partial,
        key=key,
        progress=lambda done, total: told.append(done),
    )
    handle.remove()
    return table, told, runs


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial tables are saved after every choice, not every few seconds."""
    monkeypatch.setattr(profiling, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(profiling, "_SAVE_SHARE", 1e9)


CHOICES, BINS, SAMPLES = 13 * 2, 2, 3
OVERHEAD = 2 * BINS + BINS * SAMPLES  # references twice, and single samples for the floor


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("after", [0, 7, CHOICES - 1])
def test_a_second_start_measures_only_what_is_missing_and_ends_with_the_same_table(
    case: Case, tmp_path: Path, after: int
) -> None:
    assert CHOICES == len(case[1].quantizable) * len(SCHEMES)
    interrupted(case, tmp_path / "partial.parquet", after)

    table, told, runs = resumed(case, tmp_path / "partial.parquet")

    assert told == list(range(after + 1, CHOICES + 1))
    assert runs == OVERHEAD + BINS * (CHOICES - after)
    assert table.frame.to_dict("list") == profile(
        case[0], case[1], SCHEMES, plain_calls()
    ).frame.to_dict("list")


@pytest.mark.usefixtures("eager")
def test_unfinished_work_on_another_question_is_not_used(case: Case, tmp_path: Path) -> None:
    interrupted(case, tmp_path / "partial.parquet", 7, key="another seed, say")

    _, told, _ = resumed(case, tmp_path / "partial.parquet")

    assert told[0] == 1


@pytest.mark.usefixtures("eager")
def test_unfinished_work_on_another_model_is_not_used(case: Case, tmp_path: Path) -> None:
    larger = PlainDenoiser(blocks=2).eval()
    interrupted((larger, extract(larger, plain_calls()[0].kwargs)), tmp_path / "partial.parquet", 7)

    _, told, _ = resumed(case, tmp_path / "partial.parquet")

    assert told[0] == 1


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_partial_file_is_not_used(case: Case, tmp_path: Path, share: float) -> None:
    path = tmp_path / "partial.parquet"
    interrupted(case, path, 7)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    _, told, _ = resumed(case, path)

    assert told == list(range(1, CHOICES + 1))


class Fragile(nn.Module):
    """Its output overflows as soon as `second` is not what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.own = self.second.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * (
            1.0 if torch.equal(self.second.weight, self.own) else torch.inf
        )


def test_an_output_that_is_not_finite_is_named_with_its_choice() -> None:
    model, calls = Fragile(), [Call((), {"x": torch.randn(3, 4)}, i) for i in range(2)]

    with pytest.raises(
        QSearchError, match="the output is not finite with second at uint4-c in step bin 0"
    ):
        profile(model, extract(model, calls[0].kwargs), ["uint4-c"], calls)


@pytest.mark.parametrize(("schemes", "calls"), [([], 1), (["uint4-c"], 0)])
def test_profiling_nothing_is_refused(case: Case, schemes: list[str], calls: int) -> None:
    with pytest.raises(QSearchError, match="at least one scheme and one recorded call"):
        profile(*case, schemes, plain_calls(calls))


def test_an_unknown_estimator_is_answered_with_the_nearest(case: Case) -> None:
    with pytest.raises(
        QSearchError, match="no plug-in 'sweeep' among the estimators; did you mean 'sweep'"
    ):
        profile(*case, SCHEMES, plain_calls(), estimator="sweeep")
