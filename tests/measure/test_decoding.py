"""Decoding: pictures are the pipeline's own, packed or not, scaled or shifted, still or moving;
metrics that need them are refused before.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qsearch.core.errors import QSearchError
from qsearch.core.plan import Plan
from qsearch.graphs.extraction import extract
from qsearch.measure import decoding
from qsearch.measure.calling import arguments
from qsearch.measure.decoding import check_metrics, decodable, decode, decode_batch, picture_shape
from qsearch.measure.evaluation import evaluate, make, pictures_of
from qsearch.measure.pipelines import (
    Prompts,
    Sampling,
    denoiser_of,
    example_inputs,
    record,
    sample,
)
from qsearch.measure.profiling import profile_pipeline
from tests.measure.staged import staged
from tests.tiny_pipelines import build

PROMPTS = Prompts(("a red square", "a blue circle"))
SIZES: dict[str, dict[str, Any]] = {
    "flux": {"resolution": 16},
    "sana": {"resolution": 64},
    "cogvideox": {"resolution": 16, "frames": 5},
}
#: fp32 rounding of pictures in another batch
ROUNDING = 1e-4


def own(pipe: Any, sampling: Sampling) -> Tensor:
    """The pictures that the pipeline makes when it is called plainly."""
    made = pipe(**arguments(pipe, PROMPTS, 0, sampling) | {"output_type": "pt"})[0]
    found: Tensor = made * 2 - 1
    return found


@pytest.mark.parametrize(
    "name", ["stable_diffusion", "pixart_alpha", "stable_diffusion_3", "flux", "sana", "cogvideox"]
)
def test_pictures_are_the_pipeline_s_own(name: str) -> None:
    pipe, sampling = build(name), Sampling(steps=2, **SIZES.get(name, {}))
    latents = sample(pipe, PROMPTS, sampling)

    pictures = decode(pipe, latents, sampling=sampling)

    torch.testing.assert_close(pictures, own(pipe, sampling), rtol=ROUNDING, atol=ROUNDING)
    assert picture_shape(pipe, sampling) == tuple(pictures.shape[1:])
    single = decode(pipe, latents, batch=1, sampling=sampling)
    torch.testing.assert_close(single, pictures, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    "said", [{"latents_mean": [0.3, 1, -2, 0], "latents_std": [1, 3, 0.5, 2]}, {}]
)
def test_means_and_deviations_of_latents_are_undone(said: dict[str, Any]) -> None:
    pipe, sampling = build("stable_diffusion_xl"), Sampling(steps=2)
    pipe.vae.register_to_config(**said)
    latents = sample(pipe, PROMPTS, sampling)

    pictures = decode(pipe, latents, sampling=sampling)

    torch.testing.assert_close(pictures, own(pipe, sampling), rtol=ROUNDING, atol=ROUNDING)
    assert list(decoding._ways[pipe].values()) == [not said]  # the plain formula where it holds


@pytest.mark.parametrize("name", ["pixart_sigma", "flux"])
def test_gradients_go_through_the_pictures(name: str) -> None:
    pipe, sampling = build(name), Sampling(steps=1, **SIZES.get(name, {}))
    latents = sample(pipe, PROMPTS, sampling).requires_grad_()

    decode_batch(pipe, latents, sampling).square().sum().backward()

    assert latents.grad is not None
    assert float(latents.grad.abs().amax(tuple(range(1, latents.ndim))).min()) > 0


def test_decoding_leaves_the_pipeline_as_it_was() -> None:
    pipe, sampling = build("flux"), Sampling(steps=2, resolution=16)
    kind = type(pipe.scheduler)
    before = sample(pipe, PROMPTS, sampling)

    decode(pipe, before, sampling=sampling)

    assert type(pipe.scheduler) is kind
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(sample(pipe, PROMPTS, sampling), before)


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_as_many_pictures_are_decoded_at_once_as_are_sampled_each_with_its_prompt(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, seen = Prompts(tuple(f"a ring {i}" for i in range(5))), list[tuple[int, ...]]()

    def one(pipe: Any, latents: Tensor, sampling: Sampling, given: Prompts) -> Tensor:
        seen.append(tuple(int(x) for x in latents[:, 0]))
        assert given.texts == tuple(f"a ring {i}" for i in seen[-1])
        return latents

    monkeypatch.setattr(decoding, "decode_batch", one)
    latents = torch.arange(5.0).reshape(5, 1)

    found = pictures_of(None, latents, Sampling(batch=batch), prompts)

    assert torch.equal(found, latents)
    assert max(map(len, seen)) == min(batch, 5)
    assert [i for part in seen for i in part] == [0, 1, 2, 3, 4]


def test_a_pipeline_without_a_decoder_makes_no_pictures() -> None:
    assert "Staged makes none" in decodable(staged(), Sampling(steps=3))


def test_pictures_that_nobody_decodes_are_refused_before_profiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = build("cogvideox")
    pipe.vae.decode = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no decoder"))
    sampling = Sampling(steps=2, resolution=16, frames=5)
    model = denoiser_of(pipe)
    calls = record(pipe, PROMPTS, sampling, 1)
    graph = extract(model, example_inputs(calls[0], model))
    monkeypatch.setattr("qsearch.measure.profiling.record", lambda *a: pytest.fail("it began"))

    with pytest.raises(QSearchError, match=r"ssim look at pictures: .*no decoder.*; measure noise"):
        profile_pipeline(
            pipe,
            graph,
            PROMPTS,
            sampling,
            schemes=("int4-c",),
            bins=1,
            metrics=("noise", "ssim"),
        )

    outcome = make(pipe, graph, Plan.uniform(graph, "int4-c"), PROMPTS, sampling)
    reference = make(pipe, graph, Plan.uniform(graph, "keep"), PROMPTS, sampling)
    assert outcome.pictures.shape == (2, 0)
    assert evaluate(outcome, reference, ["sqnr"])["sqnr"][0] > 0
    with pytest.raises(QSearchError, match="ssim look at pictures, and the pipeline makes none"):
        evaluate(outcome, reference, ["sqnr", "ssim"])


def test_the_zoo_s_distance_is_for_the_zoo_s_pictures() -> None:
    pipe = build("stable_diffusion")

    with pytest.raises(QSearchError, match="frechet compare with the zoo's scenes of 3x64x64"):
        check_metrics(pipe, ["sqnr", "ssim", "frechet"], Sampling())
    check_metrics(pipe, ["noise", "sqnr", "ssim"], Sampling())


def test_videos_have_a_similarity_of_their_frames() -> None:
    pipe, sampling = build("cogvideox"), Sampling(steps=2, resolution=16, frames=5)
    calls = record(pipe, PROMPTS, sampling, 1)
    model = denoiser_of(pipe)
    graph = extract(model, example_inputs(calls[0], model))
    check_metrics(pipe, ["ssim"], sampling)

    found = {
        scheme: evaluate(
            make(pipe, graph, Plan.uniform(graph, scheme), PROMPTS, sampling),
            make(pipe, graph, Plan.uniform(graph, "keep"), PROMPTS, sampling),
            ["ssim"],
        )["ssim"][0]
        for scheme in ("keep", "int8-c", "int3-c")
    }

    assert found["keep"] == pytest.approx(1, abs=1e-6)
    assert 1 >= found["int8-c"] > found["int3-c"]
