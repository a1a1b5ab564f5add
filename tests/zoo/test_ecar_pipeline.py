"""The pipeline of the multistage model: saving, seeds, callbacks, gradients, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsearch.core.errors import QSearchError
from qsearch.zoo.ecar.flow import EcarFlow2DModel
from qsearch.zoo.ecar.pipeline import EcarPipeline
from qsearch.zoo.ecar.scheduler import MultistageFlowScheduler
from qsearch.zoo.ecar.stages import FULL, MULTISTAGE, Stages
from qsearch.zoo.ecar.training import frozen_parts
from qsearch.zoo.ecar.transformer import EcarTransformer2DModel

ROUNDING = 1e-5  # fp32 through a few blocks


def new_pipeline(kind: str = MULTISTAGE, stages: int = 3, renoise: str = "corrected") -> Any:
    """A pipeline with small untrained networks and the zoo's VAE and text encoder."""
    torch.manual_seed(9)
    tokenizer, text_encoder, vae = frozen_parts()
    flow = EcarFlow2DModel(stages=stages, num_layers=1)
    torch.nn.init.normal_(flow.proj_out.weight, std=0.02)
    pipe = EcarPipeline(
        transformer=EcarTransformer2DModel(stages=stages, num_layers=1),
        flow=flow,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=MultistageFlowScheduler(stages=stages, kind=kind, renoise=renoise),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    """Generators of these seeds."""
    return [torch.Generator().manual_seed(n) for n in numbers]


TEXTS = ["a red ring left of a blue square", "a white star above a green cross , on navy"]


@pytest.mark.parametrize(("kind", "stages"), [(MULTISTAGE, 3), (FULL, 3), (MULTISTAGE, 1)])
def test_it_paints_pictures_and_gives_latents(kind: str, stages: int) -> None:
    pipe = new_pipeline(kind, stages)

    images = pipe(TEXTS, num_inference_steps=3).images
    latents = pipe(TEXTS, num_inference_steps=3, output_type="latent", return_dict=False)[0]

    assert [i.size for i in images] == [(64, 64)] * 2
    assert latents.shape == (2, 4, 16, 16)


def test_a_saved_pipeline_paints_what_it_painted_before(tmp_path: Path) -> None:
    pipe = new_pipeline(renoise="white")
    pipe.save_pretrained(tmp_path)
    again = EcarPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)

    before, after = (
        p(TEXTS, num_inference_steps=4, generator=seeds(1, 2), output_type="latent").images
        for p in (pipe, again)
    )

    assert again.scheduler.config.renoise == "white"
    assert {"transformer", "flow", "vae", "text_encoder", "tokenizer", "scheduler"} == set(
        again.components
    )
    torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_a_sample_depends_on_its_own_seed_and_not_on_its_batch() -> None:
    pipe = new_pipeline()

    def paint(texts: list[str], *numbers: int) -> Tensor:
        made: Tensor = pipe(
            texts, num_inference_steps=4, generator=seeds(*numbers), output_type="latent"
        ).images
        return made

    both = paint(TEXTS, 1, 2)

    torch.testing.assert_close(paint(TEXTS[1:], 2)[0], both[1], atol=ROUNDING, rtol=0)
    assert float((paint(TEXTS[1:], 3)[0] - both[1]).abs().max()) > 0.1


def test_given_latents_take_the_place_of_the_first_stage_s_noise() -> None:
    pipe = new_pipeline()
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    wanted: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}

    drawn = pipe(TEXTS[0], generator=torch.Generator().manual_seed(1), **wanted).images
    generator = torch.Generator().manual_seed(1)
    torch.randn(1, 4, 4, 4, generator=generator)
    given = pipe(TEXTS[0], generator=generator, latents=noise, **wanted).images

    torch.testing.assert_close(drawn, given, atol=0, rtol=0)


def test_a_callback_hears_every_step_and_may_change_the_latents() -> None:
    pipe, heard = new_pipeline(), []

    def listen(_: Any, step: int, time: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        heard.append((step, round(float(time)), tensors["latents"].shape[-1]))
        return {"latents": tensors["latents"] * 0}

    latents = pipe(
        TEXTS, num_inference_steps=4, callback_on_step_end=listen, output_type="latent"
    ).images

    assert heard == [(0, 1000, 4), (1, 800, 8), (2, 500, 16), (3, 250, 16)]
    assert not latents.any()


def test_guidance_of_one_takes_half_the_batch() -> None:
    pipe, sizes = new_pipeline(), []
    pipe.flow.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))

    pipe(TEXTS, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    pipe(TEXTS, num_inference_steps=3, guidance_scale=3.0, output_type="latent")

    assert sizes == [2] * 3 + [4] * 3


def test_the_tool_samples_it_like_any_pipeline() -> None:
    from qsearch.measure.pipelines import Sampling, decode, sample, scene_prompts

    pipe = new_pipeline()
    latents = sample(pipe, scene_prompts(3, 0), Sampling(steps=3, batch=2))

    assert decode(pipe, latents).shape == (3, 3, 64, 64)


def test_gradients_flow_through_the_whole_generation() -> None:
    import inspect

    pipe = new_pipeline()
    call = inspect.unwrap(type(pipe).__call__)

    latents = call(pipe, TEXTS, num_inference_steps=3, output_type="latent").images
    latents.square().mean().backward()

    parts = (pipe.transformer, pipe.flow)
    assert [n for part in parts for n, p in part.named_parameters() if p.grad is None] == []


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Stages(3, 18), "multiple of 4; given 18, the nearest is 16"),
        (lambda: Stages(0, 16), "at least one stage; given 0"),
        (lambda: Stages(3, 16, "half"), "multistage or full; given 'half'"),
        (lambda: EcarFlow2DModel(sample_size=18), "must be a multiple of 4; given 18"),
        (lambda: EcarTransformer2DModel(sample_size=12), "multiple of 8, given 12"),
        (lambda: EcarTransformer2DModel(patch_size=4), "patches of 2 x 2; given 4"),
        (lambda: MultistageFlowScheduler(renoise="pink"), "corrected, white, none; given 'pink'"),
        (lambda: MultistageFlowScheduler(prediction_type="epsilon"), "given 'epsilon'"),
        (lambda: MultistageFlowScheduler().set_timesteps(2), "must be at least 3; given 2"),
        (
            lambda: new_pipeline()("a", latents=torch.zeros(1, 4, 16, 16)),
            "1 x 4 x 4 x 4 for 1 prompts; given 1 x 4 x 16 x 16",
        ),
        (lambda: new_pipeline()(TEXTS, generator=seeds(1)), "given 1 for 2"),
        (
            lambda: new_pipeline()("a", callback_on_step_end_tensor_inputs=["noise"]),
            "latents, maps; given ['noise']",
        ),
        (
            lambda: EcarFlow2DModel(num_layers=1)(
                torch.zeros(1, 4, 12, 12), torch.tensor(1.0), torch.zeros(1, 36, 160)
            ),
            "4 x 4, 8 x 8, 16 x 16; given 12 x 12",
        ),
        (
            lambda: EcarTransformer2DModel(num_layers=1)(
                torch.zeros(1, 64, 4), torch.zeros(1, 3, 128)
            ),
            "[0, 16, 80] tokens in all; given 64",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_with_what_was_given(wrong: Any, message: str) -> None:
    with pytest.raises(QSearchError) as error:
        wrong()

    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_of_different_stages_make_no_pipeline() -> None:
    pipe = new_pipeline()
    parts = {k: v for k, v in pipe.components.items() if k != "scheduler"}

    with pytest.raises(QSearchError, match="scheduler: 1 stages, side 16"):
        EcarPipeline(**parts, scheduler=MultistageFlowScheduler(stages=1))
