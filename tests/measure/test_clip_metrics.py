"""Metrics of the zoo's clips: looks and motion are read apart, flicker by optical flow, and what is
no clip is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsearch import zoo
from qsearch.core.errors import QSearchError
from qsearch.measure.evaluation import Outcome
from qsearch.measure.metrics import alignment, flow, frechet, motion
from qsearch.measure.own import own_of
from qsearch.measure.pipelines import Prompts, scene_prompts
from qsearch.measure.predicted_x0 import PredictedX0
from qsearch.measure.sampling import SamplingSettings
from qsearch.zoo.moving_scenes import OF_MOTION, Clips, describe, draw_clips, render

COUNT = 32


def world() -> tuple[Clips, Prompts]:
    generator = torch.Generator().manual_seed(4)
    clips = draw_clips(COUNT, generator, held_out=True)
    captions = tuple(describe(clips, generator))
    return clips, Prompts(tuple(c.text for c in captions), captions)


def outcome(frames: Tensor, prompts: Prompts) -> Outcome:
    return Outcome(prompts, torch.zeros(len(frames), 8, 8, 4, 4), frames, (), 8)


def frames_of(clips: Clips) -> Tensor:
    return render(clips).transpose(1, 2).contiguous()


def test_looks_and_motion_are_read_apart() -> None:
    clips, prompts = world()
    whole = outcome(frames_of(clips), prompts)
    back = outcome(whole.pictures.flip(1), prompts)  # the same looks, moving the other way
    other = torch.where(clips.colour < 0, -1, (clips.colour + 3) % 6)
    painted = outcome(frames_of(replace(clips, colour=other)), prompts)

    looks = {
        o: alignment.measure(x, whole).mean()
        for o, x in zip("wbp", (whole, back, painted), strict=True)
    }
    moves = {
        o: motion.measure(x, whole).mean()
        for o, x in zip("wbp", (whole, back, painted), strict=True)
    }

    assert looks["w"] > 0.9
    assert moves["w"] > 0.85
    assert looks["b"] > looks["w"] - 0.05
    assert moves["b"] < moves["w"] - 0.2
    assert looks["p"] < looks["w"] - 0.1
    assert moves["p"] > moves["w"] - 0.1


def test_features_tell_looks_from_motion_and_have_gradients() -> None:
    clips, _prompts = world()
    own = frames_of(clips)
    whole = PredictedX0(torch.zeros(COUNT, 1), lambda _: own, 8)
    given = own.flip(1).requires_grad_()
    back = PredictedX0(torch.zeros(COUNT, 1), lambda _: given, 8)
    far = {}
    for metric in (alignment, motion):
        values, scale = metric.features(back, whole)
        base, _ = metric.features(whole, whole)
        far[metric] = float(((values - base).double().square().sum(1) / scale).mean().detach())
        values.sum().backward()

    assert far[motion] > 2 * far[alignment] > 0
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.slow
def test_the_distance_of_clips_grows_with_what_is_wrong() -> None:
    clips, prompts = world()
    whole = outcome(frames_of(clips), prompts)
    dice = torch.Generator().manual_seed(1)
    noisy = (whole.pictures + 0.5 * torch.randn(whole.pictures.shape, generator=dice)).clamp(-1, 1)

    near, far = (frechet.measure(x, whole) for x in (whole, outcome(noisy, prompts)))

    assert 0 < near < far


def test_warping_error_is_of_flicker_and_not_of_motion() -> None:
    clips, prompts = world()
    own = frames_of(clips)
    dice = torch.Generator().manual_seed(1)
    light = 0.2 * torch.randn(COUNT, own.shape[1], 1, 1, 1, generator=dice)
    cases = {
        "still": own[:, :1].expand_as(own),
        "moving": own,
        "flicker": (own + light).clamp(-1, 1),
    }

    error = {k: flow.measure(outcome(v, prompts), outcome(own, prompts)) for k, v in cases.items()}

    assert error["still"].max() == 0
    assert error["moving"].mean() < 1e-3
    assert error["flicker"].mean() > 5 * error["moving"].mean()
    assert error["moving"].shape == (COUNT,)


@pytest.mark.parametrize("metric", [flow, motion])
def test_pictures_are_refused(metric: object) -> None:
    _, prompts = world()
    picture = outcome(torch.zeros(COUNT, 3, 64, 64), prompts)

    with pytest.raises(QSearchError, match=r"frames.* given (32 x )?3"):
        metric.measure(picture, picture)  # type: ignore[attr-defined]


def test_prompts_without_motion_are_refused_by_the_judge_of_motion() -> None:
    for prompts in (Prompts(("a boat at sea",)), scene_prompts(4, 0)):
        with pytest.raises(QSearchError, match="name no motion that its judge reads"):
            motion.check((3, 64, 64), prompts)
    motion.check((3, 64, 64), scene_prompts(4, 0, moving=True))


def test_a_clip_of_another_length_is_refused() -> None:
    clips, prompts = world()
    short = outcome(frames_of(clips)[:, :9], prompts)

    with pytest.raises(QSearchError, match="reads 15 frames of 3x64x64; given 9x3x64x64"):
        motion.measure(short, short)


def test_without_opencv_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsearch.measure.networks.find_spec", lambda name: None)

    with pytest.raises(QSearchError, match="pip install opencv-python-headless, or leave flow out"):
        flow.check((3, 64, 64), Prompts(("a boat",)))


def test_the_zoo_s_videos_have_their_own_size_and_metrics(tmp_path: Path) -> None:
    own = own_of(zoo.folder("scenes-video"))

    made = own.sampler(SamplingSettings())

    assert (made.frames, *made.size) == zoo.CLIP
    assert {"temporal", "motion", "alignment"} <= set(own.metrics())
    assert own.sampler(SamplingSettings(frames=9)).frames == 9


def test_captions_of_moving_scenes_are_held_out_and_say_how_things_move() -> None:
    prompts = scene_prompts(64, 3, moving=True)

    assert prompts == scene_prompts(64, 3, moving=True)
    assert any(w in OF_MOTION for c in prompts.captions for w, _, _ in c.named)
