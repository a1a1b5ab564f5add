"""Observations: the clean image is the scheduler's own, metrics are distances of features, a
trajectory is the sampler itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.table import SensitivityTable
from qsearch.graphs.extraction import extract
from qsearch.measure.metrics import ssim
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    denoiser_of,
    example_inputs,
    record,
    run,
    sample,
    scene_prompts,
)
from qsearch.measure.predicted_x0 import PredictedX0, coefficients, guidance_weights
from qsearch.measure.profiling import profile
from qsearch.measure.trajectory import trajectories
from tests.models import tiny_scenes_pipeline

SAMPLING = Sampling(steps=3, guidance=4.0, seed=1)


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline of random weights whose pictures the judge can read."""
    return tiny_scenes_pipeline()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return scene_prompts(4, seed=0)


@pytest.fixture(scope="module")
def graph(pipe: Any, prompts: Prompts) -> OpGraph:
    (call,) = record(pipe, prompts, SAMPLING, 1)
    return extract(pipe.unet, example_inputs(call, pipe.unet))


SCHEDULERS = {
    "DDIMScheduler": ("epsilon", "v_prediction", "sample"),
    "DDPMScheduler": ("epsilon", "v_prediction", "sample"),
    "EulerDiscreteScheduler": ("epsilon", "v_prediction"),
    "DPMSolverMultistepScheduler": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "UniPCMultistepScheduler": ("epsilon", "v_prediction", "flow_prediction"),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in SCHEDULERS.items() for kind in kinds]
)
def test_the_clean_image_is_the_one_that_the_scheduler_predicts(name: str, kind: str) -> None:
    import diffusers

    flow = {"use_flow_sigmas": True} if kind == "flow_prediction" else {}
    plain = {"clip_sample": False} if name.startswith("DD") else {}
    scheduler = getattr(diffusers, name)(prediction_type=kind, **flow, **plain)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.randn(2, 3, 4, 4)
        scheduler.scale_model_input(x, t)
        told = (
            scheduler.convert_model_output(output, sample=x)
            if hasattr(scheduler, "convert_model_output") and scheduler.step_index is not None
            else None
        )
        made = scheduler.step(output, t, x)
        told = made.pred_original_sample if hasattr(made, "pred_original_sample") else told
        keep, take = coefficients(scheduler, t)
        if told is not None:
            torch.testing.assert_close(
                keep * x + take * output, told, rtol=1e-3, atol=1e-3 * float(told.abs().max())
            )
        x = made.prev_sample


def test_flow_matching_s_last_step_ends_in_the_clean_image() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(2, 4, 8)
    for t in scheduler.timesteps:
        output, before = torch.randn_like(x), x
        x = scheduler.step(output, t, before).prev_sample
        keep, take = coefficients(scheduler, t)
    torch.testing.assert_close(keep * before + take * output, x)


def test_guidance_is_found_whatever_it_is() -> None:
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)

    assert guidance_weights(torch.cat([a, b]), a + 4 * (b - a), 4.0) == (-3.0, 4.0)
    assert guidance_weights(torch.cat([a, b]), b + 2 * (a - b), 7.0) == pytest.approx(
        (2.0, -1.0), abs=1e-5
    )
    assert guidance_weights(a, a, 4.0) == pytest.approx((1.0,))
    assert guidance_weights(torch.cat([a, b], 1), a, 4.0) == pytest.approx(
        (1.0,)
    )  # learned variance behind it
    assert guidance_weights(torch.cat([a, b]), a * b, 4.0) is None
    assert guidance_weights(a, torch.randn(3, 4, 3, 3), 4.0) is None


def test_a_recorded_call_predicts_where_the_sampler_goes(pipe: Any, prompts: Prompts) -> None:
    calls = record(pipe, prompts, SAMPLING, 3)

    last = calls[-1]
    assert last.sampled is not None
    final = sample(pipe, prompts, SAMPLING)
    torch.testing.assert_close(
        last.sampled.clean(run(pipe.unet, last)), final, rtol=1e-3, atol=1e-3
    )  # the last step ends in its own prediction
    assert last.sampled.guidance == (-3.0, 4.0)


def test_recording_in_parts_hears_the_same_calls(pipe: Any, prompts: Prompts) -> None:
    whole, parts = record(pipe, prompts, SAMPLING, 2), record(pipe, prompts, SAMPLING, 2, batch=2)

    assert [c.step for c in parts] == [c.step for c in whole for _ in range(2)]
    joined = torch.cat([example_inputs(c, pipe.unet)["sample"].chunk(2)[1] for c in parts[:2]])
    torch.testing.assert_close(
        joined, example_inputs(whole[0], pipe.unet)["sample"].chunk(2)[1], rtol=1e-4, atol=1e-4
    )


def test_the_structure_metric_is_one_minus_ssim_for_small_changes() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    from qsearch.zoo.scenes import draw_scenes, render

    pictures = render(draw_scenes(4, torch.Generator().manual_seed(0)))
    other = (pictures + 0.02 * torch.randn(pictures.shape)).clamp(-1, 1)
    values, scale = ssim.features(
        PredictedX0(torch.empty(4), lambda _: other),
        PredictedX0(torch.empty(4), lambda _: pictures),
    )
    same, _ = ssim.features(
        PredictedX0(torch.empty(4), lambda _: pictures),
        PredictedX0(torch.empty(4), lambda _: pictures),
    )

    ours = ((values - same).double().square().sum(1) / scale).mean()
    window = {"gaussian_kernel": False, "kernel_size": 7, "data_range": 1.0}
    theirs = 1 - structural_similarity_index_measure(other / 2 + 0.5, pictures / 2 + 0.5, **window)
    assert float(ours) == pytest.approx(float(theirs), rel=0.15)  # other windows, and clipped noise


METRICS = ("noise", "sqnr", "ssim", "alignment", "frechet")


def agreement(a: SensitivityTable, b: SensitivityTable, metric: str) -> tuple[float, float]:
    """(median ratio, correlation of logarithms) of two tables' estimates."""
    both = a.frame.merge(b.frame, on=["site", "scheme", "step", "metric"], suffixes=("", "_b"))
    both = both[(both["metric"] == metric) & (both["estimate_b"] > 1e-13)]
    assert len(both) >= 20
    logs = np.log(both[["estimate", "estimate_b"]].to_numpy())
    return float(np.exp(np.median(logs[:, 0] - logs[:, 1]))), float(np.corrcoef(logs.T)[0, 1])


@pytest.fixture(scope="module")
def tables(
    pipe: Any, graph: OpGraph, prompts: Prompts
) -> tuple[SensitivityTable, SensitivityTable]:
    """All metrics at once, by probes and by the sweep."""
    calls = record(pipe, prompts[:2], SAMPLING, 1, batch=1)
    asked: dict[str, Any] = {"metrics": METRICS, "pipe": pipe}
    return tuple(
        profile(pipe.unet, graph, ["uint8-c"], calls, estimator=e, probes=24, **asked)
        for e in ("probe", "sweep")
    )  # type: ignore[return-value]


@pytest.mark.parametrize("metric", METRICS)
def test_probes_agree_with_the_sweep_by_every_metric(
    tables: tuple[SensitivityTable, SensitivityTable], metric: str
) -> None:
    median, correlation = agreement(*tables, metric)

    # 24 probes on two parts: a fifth of relative error, much of it common to all layers, since they
    # share the sign vectors
    assert median == pytest.approx(1.0, abs=0.4)
    assert correlation > 0.9


def test_a_trajectory_is_what_the_pipeline_samples(
    pipe: Any, graph: OpGraph, prompts: Prompts
) -> None:
    one = trajectories(pipe, prompts, SAMPLING, batch=2)[1].observed(pipe.unet, ["sqnr"])

    expected = sample(
        pipe, prompts, Sampling(SAMPLING.steps, SAMPLING.guidance, SAMPLING.seed, batch=2)
    )[2:].flatten(1)
    torch.testing.assert_close(one.reference["sqnr"], expected)
    differentiable = one.features()["sqnr"]
    torch.testing.assert_close(differentiable.detach(), expected)
    assert differentiable.requires_grad
    assert one.sampler_steps == SAMPLING.steps


def test_a_trajectory_s_gradient_is_the_sum_of_its_steps(
    pipe: Any, graph: OpGraph, prompts: Prompts
) -> None:
    table = profile(
        pipe.unet,
        graph,
        ["uint8-c"],
        trajectories(pipe, prompts[:2], SAMPLING, 2),
        estimator="probe",
        metrics=["sqnr"],
        probes=4,
    )

    assert table.responses is not None
    values = table.responses.values["sqnr", 0]
    assert values.shape == (len(graph.quantizable), SAMPLING.steps, 4, 1)
    assert {
        int(np.count_nonzero(np.abs(values[:, t]).max((1, 2)) > 0)) for t in range(SAMPLING.steps)
    } == {len(graph.quantizable)}


def test_probes_through_the_sampler_agree_with_the_sweep(
    pipe: Any, graph: OpGraph, prompts: Prompts
) -> None:
    parts = trajectories(pipe, prompts[:1], Sampling(2, SAMPLING.guidance, SAMPLING.seed))
    ours, theirs = (
        profile(pipe.unet, graph, ["uint8-c"], parts, estimator=e, metrics=["sqnr"], probes=48)
        for e in ("probe", "sweep")
    )

    median, correlation = agreement(ours, theirs, "sqnr")
    assert median == pytest.approx(1.0, abs=0.2)
    assert correlation > 0.95


@pytest.mark.usefixtures("tables")
def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    assert "forward" not in vars(pipe.unet)
    assert "step" not in vars(pipe.scheduler)
    everything = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    assert {p.requires_grad for p in everything} == {True}
    assert {p.grad is None for p in everything} == {True}


def test_noise_of_a_trajectory_is_refused(pipe: Any, graph: OpGraph, prompts: Prompts) -> None:
    with pytest.raises(QSearchError, match="of a whole trajectory measure sqnr"):
        profile(
            pipe.unet,
            graph,
            ["uint8-c"],
            trajectories(pipe, prompts[:1], SAMPLING),
            estimator="probe",
        )


def test_a_sampler_without_gradients_says_so(
    pipe: Any, graph: OpGraph, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = pipe.scheduler.step

    def cut(output: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(output.detach(), *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", cut)
    with pytest.raises(
        QSearchError, match="DPMSolverMultistepScheduler gives no gradient through its steps"
    ):
        profile(
            pipe.unet,
            graph,
            ["uint8-c"],
            trajectories(pipe, prompts[:1], SAMPLING),
            estimator="probe",
            metrics=["sqnr"],
        )


def test_pictures_that_the_judge_does_not_know_are_refused(
    graph: OpGraph, prompts: Prompts
) -> None:
    from tests.models import tiny_pipeline

    small = tiny_pipeline()
    calls = record(small, prompts[:1], SAMPLING, 1)
    with pytest.raises(
        QSearchError,
        match="alignment of pictures that are not the zoo's 3x64x64 scenes goes by CLIP",
    ):
        profile(
            denoiser_of(small),
            graph,
            ["uint8-c"],
            calls,
            estimator="probe",
            metrics=["alignment"],
            pipe=small,
        )


def test_checkpointing_changes_no_number(pipe: Any, graph: OpGraph, prompts: Prompts) -> None:
    calls = record(pipe, prompts[:1], SAMPLING, 1)
    kept, again = (
        profile(pipe.unet, graph, ["uint4-c"], calls, estimator="probe", probes=3, checkpointing=c)
        for c in (False, True)
    )

    assert again.frame["estimate"].tolist() == pytest.approx(
        kept.frame["estimate"].tolist(), rel=1e-4
    )
    assert not pipe.unet.is_gradient_checkpointing


def test_checkpointing_of_a_plain_module_is_refused() -> None:
    from tests.models import plain, plain_calls

    with pytest.raises(
        QSearchError, match="checkpointing is built into diffusers' models; PlainDenoiser has none"
    ):
        profile(*plain(), ["uint4-c"], plain_calls(), estimator="probe", checkpointing=True)
