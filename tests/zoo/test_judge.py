"""The judge that is shipped: it reads what is there, and tells true captions from others."""

from __future__ import annotations

import math

import pytest
import torch

from qsearch.zoo import judge
from qsearch.zoo.scenes import Scenes, describe, draw_scenes, render

COUNT = 1024
ACCURACY = 0.99


@pytest.fixture(scope="module")
def network() -> judge.Judge:
    """The judge from the package."""
    return judge.load_judge()


@pytest.fixture(scope="module")
def fresh() -> tuple[Scenes, torch.Tensor]:
    """Scenes with a seed that no training or score used, rendered."""
    scenes = draw_scenes(COUNT, torch.Generator().manual_seed(987_654))
    return scenes, render(scenes)


def test_every_attribute_is_read_back_from_fresh_renders(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    scenes, pictures = fresh
    seen = judge.read(network, pictures)

    accuracy = {
        name: float((seen[name] == value).float().mean())
        for name, value in judge.labels(scenes).items()
    }
    assert set(accuracy) == {"layout", "background", "colour", "shape", "size", "texture"}
    assert {name: share for name, share in accuracy.items() if share < ACCURACY} == {}


def test_true_captions_are_found_and_those_of_other_pictures_are_not(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    scenes, pictures = fresh
    captions = describe(scenes, torch.Generator().manual_seed(1))

    true = judge.alignment(network, pictures, captions)
    shuffled = judge.alignment(network, pictures, captions[1:] + captions[:1])

    assert float(true.mean()) > ACCURACY
    assert float(shuffled.mean()) < 0.5
    # By chance a sixth of the layouts and shapes fits, an eighth of the colours, half of the sizes
    # and textures.
    assert float(shuffled.mean()) > 0.1


def test_the_order_of_the_objects_matters(network: judge.Judge) -> None:
    scenes = draw_scenes(400, torch.Generator().manual_seed(5))
    row = scenes[
        torch.nonzero((scenes.layout == 0) & (scenes.colour[:, 0] != scenes.colour[:, 1])).flatten()
    ]
    captions = describe(row, torch.Generator().manual_seed(2))
    mirrored = render(row).flip(-1)

    assert float(judge.alignment(network, render(row), captions).mean()) > ACCURACY
    assert float(judge.alignment(network, mirrored, captions).mean()) < 0.75


def test_alignment_is_the_share_of_the_named_attributes_that_fit(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    scenes, pictures = fresh
    seen = judge.read(network, pictures[:64])
    captions = describe(scenes[:64], torch.Generator().manual_seed(1))

    for i, (caption, score) in enumerate(
        zip(captions, judge.alignment(network, pictures[:64], captions).tolist(), strict=True)
    ):
        hits = [
            int(seen[w][i] if k < 0 else seen[w][i, k]) == value for w, k, value in caption.named
        ]
        assert score == pytest.approx(sum(hits) / len(hits))


def test_hits_by_attribute_agree_with_alignment(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    scenes, pictures = fresh
    captions = describe(scenes, torch.Generator().manual_seed(1))[1:65]
    by = judge.by_attribute(network, pictures[:64], captions)
    counts = {name: sum(w == name for c in captions for w, _, _ in c.named) for name in by}

    total = float(
        (
            judge.alignment(network, pictures[:64], captions)
            * torch.tensor([len(c.named) for c in captions])
        ).sum()
    )
    assert sum(by[name] * counts[name] for name in by) == pytest.approx(total, rel=1e-5)


def test_pictures_without_content_are_not_aligned(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    captions = describe(fresh[0][:256], torch.Generator().manual_seed(1))
    noise = torch.rand(256, 3, 64, 64) * 2 - 1

    assert float(judge.alignment(network, noise, captions).mean()) < 0.5


def test_a_little_blur_and_noise_does_not_mislead(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    scenes, pictures = fresh
    captions = describe(scenes, torch.Generator().manual_seed(1))[:256]
    blurred = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(pictures[:256], (1, 1, 1, 1), mode="replicate"), 3, 1
    )
    worse = 0.5 * pictures[:256] + 0.5 * blurred + 0.05 * torch.randn(256, 3, 64, 64)

    assert float(judge.alignment(network, worse, captions).mean()) > 0.98


def test_features_are_128_finite_numbers_that_differ_with_the_picture(
    network: judge.Judge, fresh: tuple[Scenes, torch.Tensor]
) -> None:
    features = network.embed(fresh[1][:64])

    assert features.shape == (64, network.num_features) == (64, 128)
    assert math.isfinite(float(features.abs().sum()))
    assert float(torch.pdist(features).min()) > 1e-3
