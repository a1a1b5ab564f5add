"""evaluate: full precision is perfect, coarse plans are not, and error bars are what a formula
gives.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qsearch.core import plugins
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.graphs.extraction import extract
from qsearch.measure import evaluation
from qsearch.measure.decoding import needs
from qsearch.measure.evaluation import FOLDS, Outcome, evaluate, make
from qsearch.measure.metrics import frechet, sqnr
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    example_inputs,
    record,
    record_sampling,
    scene_prompts,
)
from qsearch.zoo import judge
from qsearch.zoo.scenes import describe, draw_scenes, render
from tests.models import tiny_pipeline

SAMPLING = Sampling(steps=4, seed=3)
METRICS = ("sqnr", "ssim")
Found = dict[str, tuple[float, float]]


@pytest.fixture(scope="module")
def measured() -> dict[str, Found]:
    """Full precision, measured twice, and two uniform plans on a pipeline of random weights;
    `wound` is what changed in the model.
    """
    pipe, prompts = tiny_pipeline(), scene_prompts(4, seed=0)
    calls = record(pipe, prompts, SAMPLING, 2)
    graph = extract(pipe.unet, example_inputs(calls[0], pipe.unet))
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    reference = outcome_of(pipe, graph, "keep", prompts, calls)
    found = {
        s: evaluate(outcome_of(pipe, graph, s, prompts, calls), reference, METRICS)
        for s in ("keep", "uint8-c", "uint3-c")
    }
    wounds = [k for k, v in pipe.unet.state_dict().items() if not torch.equal(v, before[k])]
    return found | {"wounds": dict.fromkeys(wounds, (0.0, 0.0))}


def outcome_of(pipe: Any, graph: OpGraph, scheme: str, prompts: Prompts, calls: Any) -> Outcome:
    return make(pipe, graph, Plan.uniform(graph, scheme), prompts, SAMPLING, calls)


@pytest.mark.parametrize("recorded", [2, 5])
def test_what_recording_sampled_is_not_sampled_again(recorded: int) -> None:
    pipe, prompts = tiny_pipeline(), scene_prompts(5, seed=0)
    calls, sampled = record_sampling(pipe, prompts[:recorded], SAMPLING, 2)
    graph = extract(pipe.unet, example_inputs(calls[0], pipe.unet))
    keep, counted = Plan.uniform(graph, "keep"), list[int]()
    whole = make(pipe, graph, keep, prompts, SAMPLING, calls)
    again = make(
        pipe, graph, keep, prompts, SAMPLING, calls, progress=counted.append, sampled=sampled
    )
    assert sum(counted) == 5 - recorded
    torch.testing.assert_close(again.latents, whole.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.pictures, whole.pictures, rtol=1e-4, atol=1e-5)


def test_full_precision_against_itself_is_perfect(measured: dict[str, Found]) -> None:
    assert measured["keep"] == {
        "sqnr": (sqnr.CEILING, 0.0),
        "ssim": (pytest.approx(1.0, abs=1e-6), pytest.approx(0.0, abs=1e-6)),
        "noise": (0.0, 0.0),
    }


def test_coarser_plans_measure_worse_on_every_metric(measured: dict[str, Found]) -> None:
    fine, coarse = measured["uint8-c"], measured["uint3-c"]

    assert set(fine) == {"sqnr", "ssim", "noise", "output_sqnr"}
    assert coarse["noise"][0] > 100 * fine["noise"][0] > 0
    assert fine["sqnr"][0] > coarse["sqnr"][0] + 20
    assert fine["ssim"][0] > coarse["ssim"][0]


def test_decibels_and_noise_say_the_same(measured: dict[str, Found]) -> None:
    noise, error = measured["uint3-c"]["noise"]
    level, spread = measured["uint3-c"]["output_sqnr"]

    assert level == pytest.approx(-10 * math.log10(noise))
    assert spread == pytest.approx(
        10 * math.log10(1 + error / noise), rel=0.3
    )  # first order against the curve


def test_measuring_leaves_the_model_as_it_was(measured: dict[str, Found]) -> None:
    assert measured["wounds"] == {}


def outcome(values: Tensor) -> Outcome:
    """An outcome whose latents are given numbers, one a sample."""
    return Outcome(
        Prompts(tuple(f"prompt {i}" for i in range(len(values)))),
        values[:, None],
        torch.zeros(len(values), 3, 2, 2),
        (),
    )


def measured_by(
    monkeypatch: pytest.MonkeyPatch, measure: Any, values: Tensor
) -> tuple[float, float]:
    monkeypatch.setattr(
        evaluation.plugins, "load", lambda kind, name: SimpleNamespace(measure=measure)
    )
    return evaluate(outcome(values), outcome(values), ["any"])["any"]


def test_a_metric_with_a_value_a_sample_gets_the_error_of_their_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])

    found = measured_by(monkeypatch, lambda outcome, reference: outcome.latents[:, 0], values)

    assert found == pytest.approx((4.0, math.sqrt((9 + 4 + 0 + 25) / 3 / 4)))


def test_the_jackknife_error_of_a_mean_is_that_of_the_means_of_its_folds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = torch.randn(5 * FOLDS, generator=torch.Generator().manual_seed(0))
    folds = values.view(5, FOLDS).mean(0)  # sample i is in fold i modulo FOLDS

    found = measured_by(
        monkeypatch, lambda outcome, reference: float(outcome.latents.mean()), values
    )

    assert found == pytest.approx(
        (float(values.mean()), float(folds.std() / math.sqrt(FOLDS))), rel=1e-5
    )


def test_the_jackknife_error_of_a_square_is_that_of_the_delta_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = 3 + torch.randn(400 * FOLDS, generator=torch.Generator().manual_seed(0)) / 10
    folds = values.view(400, FOLDS).mean(0)

    found = measured_by(
        monkeypatch, lambda outcome, reference: float(outcome.latents.double().mean()) ** 2, values
    )

    assert found[1] == pytest.approx(2 * 3 * float(folds.std() / math.sqrt(FOLDS)), rel=0.01)


@pytest.mark.parametrize("count", [2, 5, 11])
def test_few_samples_are_folds_of_their_own_and_every_sample_is_left_out_once(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    seen: list[set[int]] = []

    def measure(outcome: Outcome, reference: Outcome) -> float:
        assert len(outcome.prompts) == len(outcome.latents) == len(outcome.pictures)
        seen.append({int(x) for x in outcome.latents[:, 0]})
        return 0.0

    measured_by(monkeypatch, measure, torch.arange(float(count)))

    whole, *parts = seen
    assert whole == set(range(count))
    assert len(parts) == min(FOLDS, count)
    assert sorted(i for part in parts for i in whole - part) == list(range(count))


def test_captions_are_left_out_with_their_samples() -> None:
    prompts = scene_prompts(3, seed=0)
    full = Outcome(prompts, torch.arange(3.0)[:, None], torch.zeros(3, 3, 2, 2), ())

    left = full.without(torch.tensor([False, True, False]))

    assert left.prompts == Prompts(
        (prompts.texts[0], prompts.texts[2]), (prompts.captions[0], prompts.captions[2])
    )
    assert left.latents.flatten().tolist() == [0.0, 2.0]


def test_alignment_needs_captions_of_the_zoo_s_world() -> None:
    with pytest.raises(QSearchError, match="alignment needs captions of the zoo's scenes"):
        evaluate(
            *[replace(rendered(2), prompts=Prompts(("a red circle", "a dog")))] * 2, ["alignment"]
        )


def test_an_unknown_metric_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        QSearchError, match="no plug-in 'ssmi' among the metrics; did you mean 'ssim'"
    ):
        evaluate(outcome(torch.zeros(2)), outcome(torch.zeros(2)), ["ssmi"])


def rendered(count: int) -> Outcome:
    """An outcome of perfect pictures."""
    dice = torch.Generator().manual_seed(0)
    scenes = draw_scenes(count, dice)
    captions = tuple(describe(scenes, dice))
    return Outcome(
        Prompts(tuple(c.text for c in captions), captions),
        torch.randn(count, 4, 16, 16),
        render(scenes),
        (),
    )


def test_three_samples_are_enough_for_every_metric() -> None:
    loaded = {name: plugins.load("metrics", name) for name in plugins.names("metrics")}
    names = [
        name
        for name, metric in loaded.items()
        if not metric.needs_video
        and not needs(metric, "weights")  # networks of other libraries
        and not hasattr(metric, "smallest")  # larger pictures than these
    ]

    found = evaluate(rendered(3), rendered(3), names)

    assert len(found) >= 4

    assert [
        name
        for name, (value, error) in found.items()
        if not (math.isfinite(value) and math.isfinite(error) and error >= 0)
    ] == []


@pytest.mark.slow
def test_the_frechet_distance_is_that_of_the_judge_s_features_of_the_pictures() -> None:
    # By hand: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). Older versions of torchmetrics hand over
    # bytes, newer ones do not.
    network, dice = judge.load_judge(), torch.Generator().manual_seed(frechet.REAL_SEED)
    found = []
    made = render(draw_scenes(64, torch.Generator().manual_seed(1)))
    for pictures in (made, render(draw_scenes(frechet.REAL, dice))):
        with torch.no_grad():
            held = torch.cat([network.embed(part) for part in pictures.split(256)]).double()
        found.append((held.mean(0), torch.cov(held.mT)))
    (m1, c1), (m2, c2) = found
    root = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root)

    assert frechet.frechet(made) == pytest.approx(expected, rel=1e-3)


def test_two_samples_are_too_few_for_the_error_of_a_frechet_distance() -> None:
    with pytest.raises(QSearchError, match="needs two pictures, and three for its error bar"):
        evaluate(rendered(2), rendered(2), ["frechet"])
