"""The multistage autoregressive model: noise levels, renoise, causality, training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qsearch import zoo
from qsearch.zoo.ecar.flow import EcarFlow2DModel
from qsearch.zoo.ecar.scheduler import MultistageFlowScheduler
from qsearch.zoo.ecar.stages import (
    FULL,
    MULTISTAGE,
    Stages,
    correlated,
    down,
    flat,
    interpolate,
    jump,
    up,
)
from qsearch.zoo.ecar.training import (
    DESIGNS,
    FullPrecisionAttention,
    MultistagePainter,
    make,
    warm_start,
)
from qsearch.zoo.ecar.transformer import EcarTransformer2DModel

ROUNDING = 1e-5  # fp32 through a few blocks
MONTE_CARLO = 0.01  # standard errors of 200 000 draws are a quarter of this


# -------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("count", "levels"),
    [
        (1, [(1.0, 0.0)]),
        (3, [(1, 2 / 3), (0.8, 1 / 3), (0.5, 0)]),
        (4, [(1, 0.75), (6 / 7, 0.5), (2 / 3, 0.25), (0.4, 0)]),
    ],
)
def test_noise_levels_are_those_of_pyramid_flow(count: int, levels: list[Any]) -> None:
    stages = Stages(count, 16)

    found = [(stages.start(k), stages.end(k)) for k in range(count)]

    torch.testing.assert_close(torch.tensor(found), torch.tensor(levels), atol=1e-6, rtol=0)


def test_three_full_stages_each_go_from_noise_to_picture() -> None:
    stages = Stages(3, 16, FULL)

    assert [(stages.start(k), stages.end(k)) for k in range(3)] == [(1.0, 0.0)] * 3
    assert stages.sides == (4, 8, 16)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_renoise_is_negatively_correlated_inside_blocks_only(gamma: float) -> None:
    white = torch.randn(50_000, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    noise = correlated(white, gamma)[:, 0]

    block = noise[:, :2, :2].flatten(1)
    wanted = (1 + gamma) * torch.eye(4) - gamma
    torch.testing.assert_close(block.T @ block / len(block), wanted, atol=0.03, rtol=0)
    across = (noise[:, 0, 1] * noise[:, 0, 2]).mean()
    assert abs(float(across)) < 0.03


@pytest.mark.parametrize("stage", [1, 2])
def test_a_jump_lands_on_the_marginals_that_the_next_stage_trained_on(stage: int) -> None:
    # A fixed picture, many noises: mean and covariance of a 2x2 block say all of a Gaussian.
    stages, generator = Stages(3, 16), torch.Generator().manual_seed(1)
    clean = torch.randn(1, 1, 16, 16, generator=generator)
    side, n = stages.sides[stage], 200_000
    coarse = down(clean, 2 * 16 // side)[..., :1, :1]
    level = stages.end(stage - 1)
    ended = level * torch.randn(n, 1, 1, 1, generator=generator) + (1 - level) * coarse

    begun = jump(ended, stages, stage, torch.randn(n, 1, 2, 2, generator=generator), "corrected")

    start = stages.start(stage)
    block = begun.flatten(1)
    wanted = ((1 - start) * up(coarse)).flatten()
    torch.testing.assert_close(block.mean(0), wanted, atol=MONTE_CARLO, rtol=0)
    covariance = (block - wanted).T @ (block - wanted) / n
    torch.testing.assert_close(covariance, start**2 * torch.eye(4), atol=MONTE_CARLO, rtol=0)


@pytest.mark.parametrize("renoise", ["white", "none"])
def test_without_the_correction_the_noise_of_a_block_stays_correlated(renoise: str) -> None:
    stages, generator = Stages(3, 16), torch.Generator().manual_seed(2)
    ended = stages.end(0) * torch.randn(100_000, 1, 1, 1, generator=generator)
    white = torch.randn(100_000, 1, 2, 2, generator=generator)

    block = jump(ended, stages, 1, white, renoise).flatten(1)

    together = float((block[:, 0] * block[:, 1]).mean())
    assert together == pytest.approx((stages.renoise(1)[0] * stages.end(0)) ** 2, abs=MONTE_CARLO)


def test_the_noise_of_coarse_stages_keeps_unit_variance() -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(20_000, 1, 4, 4, generator=generator)
    ways = [torch.ones(20_000)] * 3

    samples = interpolate(Stages(3, 4), torch.zeros_like(noise), noise, ways)

    for k, sample in enumerate(samples):
        level = Stages(3, 4).start(k)
        assert float(sample.point.std()) == pytest.approx(level, abs=0.01)


@pytest.mark.parametrize("kind", [MULTISTAGE, FULL])
def test_steps_along_the_true_velocity_lead_from_start_to_end_of_a_stage(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    clean, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
    stages = Stages(3, 16, kind)
    begin = interpolate(stages, clean, noise, [torch.ones(2)] * 3)
    scheduler = MultistageFlowScheduler(kind=kind)
    scheduler.set_timesteps(7)
    assert scheduler.shares == (2, 2, 3)

    for sample, share in zip(begin, scheduler.shares, strict=True):
        x = sample.point
        for _ in range(share):
            time = scheduler.timesteps[scheduler.step_index]
            x = scheduler.step(sample.velocity, time, x).prev_sample
        torch.testing.assert_close(x, sample.final, atol=ROUNDING, rtol=0)

    torch.testing.assert_close(x, clean, atol=ROUNDING, rtol=0)


# ------------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class Inputs:
    """A caption's states, their mask, and final latents of the first two stages."""

    text: Tensor
    mask: Tensor
    latents: list[Tensor]


@pytest.fixture
def inputs() -> Inputs:
    g = torch.Generator().manual_seed(5)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    latents = [torch.randn(2, 4, side, side, generator=g) for side in (4, 8)]
    return Inputs(torch.randn(2, 9, 128, generator=g), mask, latents)


@pytest.fixture
def transformer() -> EcarTransformer2DModel:
    torch.manual_seed(6)
    return EcarTransformer2DModel(num_layers=2).eval()


def test_one_forward_a_stage_gives_the_maps_that_one_pass_over_all_gives(
    transformer: EcarTransformer2DModel, inputs: Inputs
) -> None:
    with torch.no_grad():
        maps = transformer.maps(flat(inputs.latents), inputs.text, inputs.mask)
        for k, tokens in enumerate((4, 16, 64)):
            alone = transformer(flat(inputs.latents[:k]), inputs.text, inputs.mask)
            assert alone.shape == (2, tokens, 160)
            torch.testing.assert_close(alone, maps[k], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("changed", [0, 1])
def test_a_map_depends_on_the_stages_before_and_on_no_later_one(
    transformer: EcarTransformer2DModel, inputs: Inputs, changed: int
) -> None:
    other = [x + 1.0 if k == changed else x for k, x in enumerate(inputs.latents)]

    with torch.no_grad():
        before = transformer.maps(flat(inputs.latents), inputs.text, inputs.mask)
        after = transformer.maps(flat(other), inputs.text, inputs.mask)

    moved = [float((a - b).abs().max()) > ROUNDING for a, b in zip(before, after, strict=True)]
    assert moved == [k > changed for k in range(3)]


def test_padding_is_not_seen_and_every_word_is(
    transformer: EcarTransformer2DModel, inputs: Inputs
) -> None:
    for word, seen in ((5, True), (7, False)):
        text = inputs.text.clone()
        text[1, word] += 1
        with torch.no_grad():
            before = transformer(None, inputs.text, inputs.mask)
            after = transformer(None, text, inputs.mask)
        assert (float((before[1] - after[1]).abs().max()) > ROUNDING) is seen
        torch.testing.assert_close(before[0], after[0], atol=ROUNDING, rtol=0)


def test_the_flow_keeps_the_size_of_its_stage_and_reads_map_and_time() -> None:
    torch.manual_seed(7)
    flow = EcarFlow2DModel(num_layers=1).eval()
    torch.nn.init.normal_(flow.proj_out.weight)

    with torch.no_grad():
        for side in (4, 8, 16):
            x, maps = torch.randn(2, 4, side, side), torch.randn(2, side * side // 4, 160)
            velocity = flow(x, torch.tensor([900.0, 900.0]), maps)
            assert velocity.shape == x.shape
            for other in (flow(x, torch.tensor(100.0), maps), flow(x, torch.tensor(900.0), -maps)):
                assert float((other - velocity).abs().max()) > 0.01


def test_the_attention_of_training_is_that_of_sampling(
    transformer: EcarTransformer2DModel, inputs: Inputs
) -> None:
    with torch.no_grad():
        wanted = transformer(flat(inputs.latents), inputs.text, inputs.mask)
        for block in transformer.transformer_blocks:
            block.attn1.set_processor(FullPrecisionAttention())
            block.attn2.set_processor(FullPrecisionAttention())
        found = transformer(flat(inputs.latents), inputs.text, inputs.mask)

    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)


# ------------------------------------------------------------------------------------ training


def test_rivals_have_the_same_number_of_parameters_within_a_tenth() -> None:
    counts = {}
    for name, design in DESIGNS.items():
        painter = MultistagePainter(design)
        parts = (painter.transformer, painter.flow)
        counts[name] = sum(p.numel() for part in parts for p in part.parameters())

    assert max(counts.values()) <= 1.1 * min(counts.values())


def test_heads_answer_for_the_places_that_their_token_covers() -> None:
    painter = MultistagePainter(DESIGNS["scenes-ecar"])
    for stage, grid in enumerate((2, 4, 8)):
        tokens = torch.randn(1, grid * grid, 160)
        moved = tokens.clone()
        moved[:, 1] += 1  # the second token of the first row

        change = painter.seen(stage, moved)["shape"] - painter.seen(stage, tokens)["shape"]

        places = change.abs().amax(-1).view(8, 8) > ROUNDING
        wanted = torch.zeros(8, 8, dtype=torch.bool)
        wanted[: 8 // grid, 8 // grid : 16 // grid] = True
        torch.testing.assert_close(places, wanted)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_few_steps_of_training_lower_the_loss(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qsearch.zoo.ecar import training
    from qsearch.zoo.painters import cached_latents, cached_weights

    monkeypatch.setattr(training, "cached_latents", lambda r, d: cached_latents(r, d, count=32))
    monkeypatch.setattr(training, "cached_weights", cached_weights)
    torch.manual_seed(8)
    painter, loss, _ = make(name, tmp_path, torch.device("cpu"), 4)
    optimiser = torch.optim.AdamW(painter.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        value = loss(torch.Generator().manual_seed(0))
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(value.item())

    assert losses[-1] < 0.9 * losses[0]
    dead = [n for n, p in painter.named_parameters() if p.grad is None]
    assert dead == []


@pytest.mark.parametrize("name", DESIGNS)
def test_a_warm_start_reads_captions_as_the_first_blocks_of_scenes_dit_do(name: str) -> None:
    from diffusers import PixArtTransformer2DModel

    painter = MultistagePainter(DESIGNS[name]).eval()
    folder = zoo.folder("scenes-dit")
    warm_start(painter, folder)
    theirs = PixArtTransformer2DModel.from_pretrained(folder / "transformer").float().eval()
    g = torch.Generator().manual_seed(1)
    text, found = torch.randn(2, 9, 128, generator=g), []
    fine = painter.transformer.pos_embed[:, -64:]
    torch.testing.assert_close(fine, theirs.pos_embed.pos_embed, atol=ROUNDING, rtol=0)

    # A first stage of all 64 tokens is what scenes-dit sees of latents that its patches make 0.
    torch.nn.init.zeros_(theirs.pos_embed.proj.bias)
    block = theirs.transformer_blocks[len(painter.transformer.transformer_blocks) - 1]
    block.register_forward_hook(lambda *a: found.append(a[-1]))
    with torch.no_grad():
        theirs(
            torch.zeros(2, 4, 16, 16),
            encoder_hidden_states=text,
            timestep=torch.tensor([1000.0, 1000.0]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )
        states, caption = fine.expand(2, -1, -1), painter.transformer.caption_projection(text)
        for own in painter.transformer.transformer_blocks:
            still = torch.zeros(2, 960)
            states = own(states, encoder_hidden_states=caption, timestep=still)

    torch.testing.assert_close(states, found[0], atol=1e-3, rtol=1e-4)


def test_a_warm_start_takes_the_outer_blocks_for_the_flow() -> None:
    from safetensors.torch import load_file

    painter = MultistagePainter(DESIGNS["ecar-single"])
    folder = zoo.folder("scenes-dit")
    warm_start(painter, folder)

    theirs = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    ours = painter.flow.state_dict()
    for own, other in ((0, 0), (2, 2), (3, 6), (4, 7)):
        key = "transformer_blocks.{}.attn1.to_q.weight"
        assert torch.equal(ours[key.format(own)], theirs[key.format(other)].float())
    assert torch.equal(ours["proj_out.weight"], theirs["proj_out.weight"].float())
