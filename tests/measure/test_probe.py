"""Estimators without a loop over layers: probes agree with the sweep, add up to plans, survive
kills; the baselines are what they say they are.
"""

from __future__ import annotations

import itertools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.probe_responses import ProbeResponses
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure import gradients, profiling
from qsearch.measure.noise import relative_noise
from qsearch.measure.pipelines import Call, run
from qsearch.measure.profiling import profile
from qsearch.measure.simulation import simulate
from tests.models import PlainDenoiser, plain, plain_calls

SCHEMES = ("uint4-c", "uint6-c", "uint8-c")
Case = tuple[PlainDenoiser, OpGraph]


@pytest.fixture(scope="module")
def case() -> Case:
    """A denoiser and its graph."""
    return plain()


@pytest.fixture(scope="module")
def swept(case: Case) -> SensitivityTable:
    return profile(*case, SCHEMES, plain_calls(), estimator="sweep")


@pytest.fixture(scope="module")
def probed(case: Case) -> SensitivityTable:
    return profile(*case, SCHEMES, plain_calls(), estimator="probe", probes=400)


def column(table: SensitivityTable, name: str = "estimate") -> dict[tuple[str, str, int], float]:
    return {(r["site"], r["scheme"], r["step"]): r[name] for r in table.frame.to_dict("records")}


def test_probes_find_what_the_sweep_measures(
    swept: SensitivityTable, probed: SensitivityTable
) -> None:
    ours, theirs = column(probed), column(swept)

    assert set(ours) == set(theirs)
    # 400 squared normal numbers: 7% relative error; at 8 bits the first order is all there is (a
    # channel of one weight is exact, and 0)
    fine = {k: v for k, v in theirs.items() if k[1] == "uint8-c" and v > 1e-12}
    assert len(fine) >= 24
    assert {k: ours[k] for k in fine} == pytest.approx(fine, rel=0.3)
    ratios = np.array([ours[k] / fine[k] for k in fine])
    assert np.median(ratios) == pytest.approx(1.0, abs=0.05)


def test_the_stated_errors_cover_the_sweep_s_values(
    swept: SensitivityTable, probed: SensitivityTable
) -> None:
    truth, value, error = column(swept), column(probed), column(probed, "error")

    scores = np.array(
        [(value[k] - truth[k]) / error[k] for k in truth if k[1] == "uint8-c" and truth[k] > 1e-12]
    )
    assert 0.55 < np.mean(np.abs(scores) < 1) < 0.95
    assert np.mean(np.abs(scores) < 3) == 1.0


def test_parts_of_a_batch_give_the_same_as_the_whole(case: Case, swept: SensitivityTable) -> None:
    parts = []
    for call in plain_calls():
        for i in range(3):
            parts.append(Call((), {k: v[i : i + 1] for k, v in call.kwargs.items()}, call.step))

    assert column(profile(*case, SCHEMES, parts, estimator="sweep")) == pytest.approx(
        column(swept), rel=0.01, abs=1e-12
    )  # rounding, where a choice hardly moves anything
    ours = column(profile(*case, SCHEMES, parts, estimator="probe", probes=150))
    ratios = [ours[k] / v for k, v in column(swept).items() if k[1] == "uint8-c" and v > 1e-12]
    assert float(np.median(ratios)) == pytest.approx(1.0, abs=0.1)


def test_a_plan_s_error_is_predicted_with_interactions(
    case: Case, probed: SensitivityTable
) -> None:
    model, graph = case
    sites = [layer.name for layer in graph.quantizable]
    dice = np.random.default_rng(3)
    calls = plain_calls()
    references = [run(model, call) for call in calls]
    logs: dict[str, list[float]] = {"measured": [], "interactions": [], "sum": []}
    for _ in range(12):
        plan = {
            site: Scheme.parse(str(dice.choice(["uint6-c", "uint8-c", "keep"]))) for site in sites
        }
        with simulate(model, plan, graph):
            found = [
                relative_noise(run(model, call), reference)[0]
                for call, reference in zip(calls, references, strict=True)
            ]
        logs["measured"].append(np.log(np.mean(found)))
        logs["interactions"].append(np.log(probed.predict(plan)[0]))
        logs["sum"].append(np.log(probed.predict(plan, interactions=False)[0]))

    off = {k: np.abs(np.subtract(v, logs["measured"])).mean() for k, v in logs.items()}
    assert off["interactions"] < 0.12
    assert off["interactions"] < 0.7 * off["sum"]


def test_the_model_is_left_as_it_was(case: Case) -> None:
    model, graph = case
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.conv_in.weight.requires_grad_(False)

    for estimator in ("probe", "fisher", "weight_error"):
        profile(model, graph, SCHEMES, plain_calls(), estimator=estimator, probes=2)

    assert [k for k, v in model.state_dict().items() if not torch.equal(v, weights[k])] == []
    assert {n: p.requires_grad for n, p in model.named_parameters() if not p.requires_grad} == {
        "conv_in.weight": False
    }
    assert [
        n
        for n, p in model.named_parameters()
        if p.grad is not None or p._post_accumulate_grad_hooks
    ] == []
    model.conv_in.weight.requires_grad_(True)


def test_gradients_are_freed_as_they_appear(case: Case) -> None:
    model, graph = case
    most = 0

    def count(parameter: nn.Parameter) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    handles = [
        p.register_post_accumulate_grad_hook(count) for p in model.parameters()
    ]  # runs before the contraction's own
    profile(model, graph, SCHEMES, plain_calls(1), estimator="probe", probes=2)
    for handle in handles:
        handle.remove()

    assert most == 1


def test_the_number_of_passes_grows_with_neither_layers_nor_choices() -> None:
    counts = {}
    for blocks, schemes in ((1, SCHEMES[:1]), (3, SCHEMES)):
        model = PlainDenoiser(blocks).eval()
        graph = extract(model, plain_calls()[0].kwargs)
        counts[blocks] = 0

        def count(*_: Any, blocks: int = blocks) -> None:
            counts[blocks] += 1

        handle = model.register_forward_hook(count)
        profile(model, graph, schemes, plain_calls(), estimator="probe", probes=16)
        handle.remove()

    assert (
        counts[1] == counts[3] == 2 * (2 + 2 + 3)
    )  # a bin: the reference twice, two rounds of 8 probes, three samples for the floor


class Killed(Exception):
    """What stands for SIGKILL here: nothing after it runs."""


@pytest.mark.parametrize(("estimator", "after"), [("probe", 1), ("probe", 3), ("fisher", 1)])
def test_a_killed_run_ends_with_the_same_table(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, after: int
) -> None:
    monkeypatch.setattr(profiling, "_SAVE_SECONDS", -1.0)
    monkeypatch.setattr(profiling, "_SAVE_SHARE", 1e9)
    asked: dict[str, Any] = {
        "estimator": estimator,
        "probes": 16,
        "partial": tmp_path / "p.parquet",
        "key": "k",
    }

    def stop(done: int, total: int) -> None:
        if done > after:
            raise Killed

    with pytest.raises(Killed):
        profile(*case, SCHEMES, plain_calls(), progress=stop, **asked)
    backwards: list[int] = []
    handle = case[0].conv_out.weight.register_hook(lambda g: backwards.append(1))
    table = profile(*case, SCHEMES, plain_calls(), **asked)
    handle.remove()

    whole = profile(*case, SCHEMES, plain_calls(), estimator=estimator, probes=16)
    assert table.frame.to_dict("list") == whole.frame.to_dict("list")
    assert len(backwards) < 32


def test_another_seed_is_other_probes(case: Case) -> None:
    ours, again, other = (
        profile(*case, SCHEMES, plain_calls(1), estimator="probe", probes=4, seed=s)
        for s in (0, 0, 1)
    )

    assert column(ours) == column(again)
    assert all(
        a != b
        for (k, a), b in zip(column(ours).items(), column(other).values(), strict=True)
        if a > 1e-12
    )


def test_the_budget_stops_the_work_evenly(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(
        profiling, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
    )  # a second passes with every round

    table = profile(
        *case,
        SCHEMES,
        plain_calls(),
        estimator="probe",
        probes=800,
        budget_seconds=6.5,
        say=said.append,
    )

    assert "probe takes" in said[0]
    assert "stopped after 6.5 s with 7 of 200 parts" in said[1]
    assert isinstance(table.responses, ProbeResponses)
    counts = {
        cell: int(np.isfinite(v[0, 0, :, 0]).sum()) for cell, v in table.responses.values.items()
    }
    assert set(counts) == {("noise", 0), ("noise", 1)}
    assert max(counts.values()) - min(counts.values()) <= 8
    assert max(counts.values()) < 800


def test_a_budget_that_leaves_choices_without_a_value_is_said(case: Case) -> None:
    with pytest.raises(
        QSearchError, match=r"after 0 s 1 of 39 choices are measured; give more time"
    ):
        profile(*case, SCHEMES, plain_calls(), estimator="sweep", budget_seconds=0.0)


def test_fisher_is_the_sum_of_squared_gradients_times_squared_moves(case: Case) -> None:
    model, _ = case
    table = profile(*case, ["uint4-c"], plain_calls(1), estimator="fisher", probes=300)

    call, weight = plain_calls(1)[0], model.conv_out.weight
    move = (quantize(weight.data, Scheme.parse("uint4-c")).dequantize() - weight).detach()
    output = model(**call.kwargs)
    squares = torch.zeros_like(weight)
    for value in output.flatten():
        squares += torch.autograd.grad(value, weight, retain_graph=True)[
            0
        ].square()  # the exact diagonal of J^T J
    expected = float((squares * move.square()).sum() / output.detach().square().sum())
    assert column(table)["conv_out", "uint4-c", 0] == pytest.approx(expected, rel=0.1)
    assert table.responses is None


def test_weight_errors_need_no_calls(case: Case) -> None:
    model, graph = case
    table = profile(model, graph, SCHEMES, [], estimator="weight_error")

    weight = model.conv_out.weight.detach()
    error = float((quantize(weight, Scheme.parse("uint4-c")).dequantize() - weight).square().sum())
    assert table.values("weight_error")["conv_out"]["uint4-c"] == pytest.approx(error, rel=1e-5)
    assert table.values("relative_weight_error")["conv_out"]["uint4-c"] == pytest.approx(
        error / float(weight.square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("estimator", ["sweep", "probe", "fisher"])
def test_an_output_that_is_not_finite_is_told_with_its_first_layer(estimator: str) -> None:
    model, graph = plain()
    model.blocks[0].attn2.to_k.weight.data[0, 0] = torch.nan

    with pytest.raises(
        QSearchError,
        match=(
            r"not finite in step bin 0; the first layer to make such numbers is "
            r"blocks\.0\.attn2\.to_k \(Linear\)"
        ),
    ):
        profile(model, graph, ["uint4-c"], plain_calls(), estimator=estimator)


def test_metrics_of_pictures_need_a_pipeline(case: Case) -> None:
    with pytest.raises(
        QSearchError,
        match=(
            "ssim look at the clean image that a call predicts; how the sampler uses this call is "
            "not known"
        ),
    ):
        profile(*case, SCHEMES, plain_calls(), metrics=("noise", "ssim"))


def test_one_probe_has_no_error_bar(case: Case) -> None:
    with pytest.raises(
        QSearchError, match="probes: input should be greater than or equal to 2; given 1"
    ):
        profile(*case, SCHEMES, plain_calls(), estimator="probe", probes=1)


@pytest.mark.parametrize("estimator", ["probe", "fisher"])
def test_transforms_that_do_more_than_move_weight_and_input_are_refused_by_name(
    case: Case, estimator: str
) -> None:
    with pytest.raises(
        QSearchError,
        match=(
            r"uint4-c\+a8~shift also has a bias for what the shift takes away: take it without "
            r"~shift, or the estimator sweep"
        ),
    ):
        profile(*case, ["uint4-c+a8~shift"], plain_calls(), estimator=estimator)


def test_moves_that_would_take_too_much_memory_are_made_again_with_the_same_result(
    case: Case, probed: SensitivityTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = profile(*case, SCHEMES, plain_calls(1), estimator="probe", probes=4)
    monkeypatch.setattr(gradients, "KEPT", 0)
    said: list[str] = []

    again = profile(*case, SCHEMES, plain_calls(1), estimator="probe", probes=4, say=said.append)

    assert column(again) == pytest.approx(column(kept), rel=1e-4, abs=1e-14)
