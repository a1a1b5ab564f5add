"""Pipelines as denoisers: noise that belongs to the sample, calls that can be repeated, folders
that are refused in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch.core.errors import QSearchError
from qsearch.graphs.extraction import extract
from qsearch.measure import pipelines
from qsearch.measure.pipelines import (
    Call,
    Prompts,
    Sampling,
    decode,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    sample,
    scene_prompts,
)
from tests.models import tiny_pipeline

SAMPLING = Sampling(steps=6, guidance=4.0, seed=3, batch=8)
#: what fp32 rounding in another batch size makes of latents of order one
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A pipeline of random weights."""
    return tiny_pipeline()


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Five captions."""
    return scene_prompts(5, seed=0)


def first_inputs(pipe: Any, prompts: Prompts, batch: int) -> Tensor:
    """What the denoiser is given first: noise alone, without its copy for guidance."""
    heard: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(args[0].clone()), with_kwargs=True
    )
    sample(pipe, prompts, Sampling(steps=2, batch=batch))
    handle.remove()
    return torch.cat([x.chunk(2)[0] for x in heard[::2]])


def test_the_noise_of_a_sample_does_not_depend_on_its_batch(pipe: Any, prompts: Prompts) -> None:
    whole, pairs = first_inputs(pipe, prompts, 8), first_inputs(pipe, prompts, 2)

    assert torch.equal(whole, pairs)
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 5


def test_the_latents_of_a_sample_do_not_depend_on_its_batch(pipe: Any, prompts: Prompts) -> None:
    whole, single = (sample(pipe, prompts, Sampling(steps=4, batch=n)) for n in (8, 1))

    torch.testing.assert_close(whole, single, rtol=ROUNDING, atol=ROUNDING)
    assert float((whole[0] - whole[1]).abs().max()) > 0.1


def test_another_seed_is_other_noise(pipe: Any, prompts: Prompts) -> None:
    ours, other = (sample(pipe, prompts, Sampling(steps=2, seed=s)) for s in (0, 1))

    assert float((ours - other).abs().amax((1, 2, 3)).min()) > 0.1


def test_progress_counts_the_samples(pipe: Any, prompts: Prompts) -> None:
    told: list[int] = []

    sample(pipe, prompts, Sampling(steps=2, batch=2), told.append)

    assert told == [2, 2, 1]


@pytest.mark.parametrize(
    ("bins", "middle"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5]), (6, [0, 1, 2, 3, 4, 5])]
)
def test_the_call_in_the_middle_of_each_bin_is_recorded(
    pipe: Any, prompts: Prompts, bins: int, middle: list[int]
) -> None:
    calls = record(pipe, prompts, SAMPLING, bins)

    assert [c.step for c in calls] == middle
    times = [float(example_inputs(c, pipe.unet)["timestep"]) for c in calls]
    assert times == sorted(times, reverse=True)
    assert {len(example_inputs(c, pipe.unet)["sample"]) for c in calls} == {
        2 * len(prompts)
    }  # with and without the caption


@pytest.mark.parametrize("bins", [0, 7])
def test_bins_that_the_sampler_does_not_have_are_refused(
    pipe: Any, prompts: Prompts, bins: int
) -> None:
    with pytest.raises(
        QSearchError,
        match=f"between 1 and the number of denoiser calls; given {bins} bins for 6 calls",
    ):
        record(pipe, prompts, SAMPLING, bins)


def test_a_recorded_call_repeats_what_happened(pipe: Any, prompts: Prompts) -> None:
    made: list[Tensor] = []
    handle = pipe.unet.register_forward_hook(
        lambda module, args, output: made.append(output[0].clone())
    )
    calls = record(pipe, prompts, SAMPLING, 6)
    handle.remove()

    assert [
        i for i, call in enumerate(calls) if not torch.equal(run(pipe.unet, call), made[i])
    ] == []


def test_a_recorded_call_is_an_example_for_extract(pipe: Any, prompts: Prompts) -> None:
    (call,) = record(pipe, prompts, SAMPLING, 1)

    graph = extract(pipe.unet, example_inputs(call, pipe.unet))

    assert {layer.calls for layer in graph} == {1}


class Loose(nn.Module):
    """A denoiser that takes some of its arguments as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, **extra: Tensor) -> Tensor:
        return self.layer(x) + extra["shift"]


def test_arguments_that_the_signature_does_not_name_are_passed_on() -> None:
    call = Call((torch.ones(2, 3),), {"shift": torch.ones(3)}, 0)

    assert set(example_inputs(call, Loose())) == {"x", "shift"}
    assert len(extract(Loose(), example_inputs(call, Loose())).layers) == 1


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, None)], ids=["tensor", "tuple"])
def test_a_denoiser_s_output_is_a_tensor_or_the_first_of_a_tuple(wrap: Any) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return wrap(x.half())

    out = run(Model(), Call((torch.ones(2, 3),), {}, 0))

    assert out.dtype == torch.float32
    assert out.shape == (2, 3)


def test_pictures_lie_in_range_and_do_not_depend_on_the_batch(pipe: Any) -> None:
    latents = 30 * torch.randn(5, 4, 8, 8)

    whole, pairs = decode(pipe, latents), decode(pipe, latents, batch=2)

    assert whole.shape == (5, 3, 16, 16)
    assert float(whole.abs().max()) == 1.0  # clamped: these latents are far too large
    torch.testing.assert_close(whole, pairs, rtol=ROUNDING, atol=ROUNDING)


def test_latents_that_are_not_finite_are_refused(prompts: Prompts) -> None:
    pipe = tiny_pipeline()
    nn.init.constant_(pipe.unet.conv_out.weight, torch.nan)

    with pytest.raises(
        QSearchError, match="StableDiffusionPipeline made latents that are not finite"
    ):
        sample(pipe, prompts, SAMPLING)


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(
        QSearchError, match="object has none of the components transformer, unet, prior"
    ):
        denoiser_of(object())


def test_scene_prompts_are_held_out_captions_that_come_again_with_their_seed() -> None:
    ours, again, other = scene_prompts(6, 1), scene_prompts(6, 1), scene_prompts(6, 2)

    assert ours == again
    assert set(ours.texts) != set(other.texts)
    assert [c.text for c in ours.captions] == list(ours.texts)


def test_prompts_are_cut_with_their_captions(prompts: Prompts) -> None:
    assert prompts[1:3] == Prompts(prompts.texts[1:3], prompts.captions[1:3])
    assert Prompts(("a", "b", "c"))[:2] == Prompts(("a", "b"))


@pytest.fixture(scope="module")
def saved(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline on disk."""
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def test_a_saved_pipeline_makes_the_same_latents(pipe: Any, prompts: Prompts, saved: Path) -> None:
    loaded = load_pipeline(saved)

    assert torch.equal(sample(loaded, prompts, SAMPLING), sample(pipe, prompts, SAMPLING))


def copied(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to / "broken"))


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
@pytest.mark.parametrize("share", [None, 0.5], ids=["missing", "truncated"])
def test_a_broken_folder_is_refused_in_one_line_that_names_it(
    saved: Path, tmp_path: Path, missing: str, share: float | None
) -> None:
    folder = copied(saved, tmp_path)
    path = folder / missing
    whole = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(whole[: int(share * len(whole))])

    with pytest.raises(QSearchError) as caught:
        load_pipeline(folder)

    assert str(caught.value).startswith(
        f"{folder} must hold a whole diffusers pipeline; loading it failed: "
    )
    assert "\n" not in str(caught.value)


def test_loading_leaves_the_verbosity_of_diffusers_as_it_was(saved: Path, tmp_path: Path) -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    load_pipeline(saved)
    with pytest.raises(QSearchError):
        load_pipeline(tmp_path)

    assert logging.get_verbosity() == before


def test_arguments_that_a_pipeline_does_not_take_are_not_given() -> None:
    class Plain:
        def __call__(self, prompt: list[str], generator: list[torch.Generator]) -> Any:
            return (torch.stack([torch.randn(4, generator=g) for g in generator]),)

    whole, single = (sample(Plain(), Prompts(("a", "b", "c")), Sampling(batch=n)) for n in (3, 1))

    assert torch.equal(whole, single)
    assert set(pipelines.arguments(Plain(), ["a"], 0, SAMPLING)) == {"prompt", "generator"}
