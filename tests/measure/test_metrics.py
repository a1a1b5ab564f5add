"""Metrics of the field: each against its own library's number, its features against the metric,
what is missing in one line.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qsearch.core import plugins
from qsearch.core.errors import QSearchError
from qsearch.measure.clip import directions, load_clip
from qsearch.measure.evaluation import Outcome, evaluate
from qsearch.measure.metrics import clip_iqa, clip_score, cmmd, fid, kid, ms_ssim, psnr
from qsearch.measure.networks import Needs, as_bytes
from qsearch.measure.observation import measured
from qsearch.measure.pipelines import Prompts
from qsearch.measure.predicted_x0 import PredictedX0
from tests.measure.metric_networks import random_rewards, save_hub

CPU = torch.device("cpu")


def pictures(count: int, side: int, noise: float = 0.0, frames: int = 0) -> Tensor:
    """Smooth pictures in [-1, 1] [N, (T,) 3, H, W], the same for every amount of noise."""
    dice = torch.Generator().manual_seed(5)
    lead = (count, frames) if frames else (count,)
    rough = torch.rand(math.prod(lead), 3, side // 8, side // 8, generator=dice) * 1.6 - 0.8
    smooth = torch.nn.functional.interpolate(rough, (side, side), mode="bilinear")
    more = torch.randn(smooth.shape, generator=dice)
    return (smooth + noise * more).clamp(-1, 1).reshape(*lead, 3, side, side)


def outcome(made: Tensor, texts: tuple[str, ...] = (), real: Path | None = None) -> Outcome:
    texts = texts or tuple(f"a red circle {i}" for i in range(len(made)))
    return Outcome(Prompts(texts), torch.zeros(len(made), 4, 2, 2), made, (), real=real)


def feature_distance(metric: Any, made: Tensor, own: Tensor) -> Tensor:
    """Squared distance of the metric's features over its scale, a sample."""
    latents = torch.zeros(len(made), 4, 2, 2)
    given = PredictedX0(latents, lambda _: made, 4)
    whole = PredictedX0(latents, lambda _: own, 4)
    values, scale = metric.features(given, whole)
    base, _ = metric.features(whole, whole)
    return ((values - base).double().square().sum(1) / scale).detach()


# ------------------------------------------------------------------------------------------- pixels


def test_psnr_is_that_of_the_formula_and_of_its_features() -> None:
    own, made = pictures(3, 32), pictures(3, 32, 0.1)

    found = psnr.measure(outcome(made), outcome(own))

    error = ((made - own) / 2).double().square().flatten(1).mean(1)
    assert found.tolist() == pytest.approx((-10 * error.log10()).tolist(), rel=1e-5)
    by_features = -10 * feature_distance(psnr, made, own).log10()
    assert by_features.tolist() == pytest.approx(found.tolist(), rel=1e-4)
    assert psnr.measure(outcome(own), outcome(own)).tolist() == [psnr.CEILING] * 3


def test_a_video_counts_as_the_mean_of_its_frames() -> None:
    own, made = pictures(2, 32, frames=3), pictures(2, 32, 0.1, frames=3)

    found = psnr.measure(outcome(made), outcome(own))

    each = psnr.measure(outcome(made.flatten(0, 1)), outcome(own.flatten(0, 1)))
    assert found.tolist() == pytest.approx(each.reshape(2, 3).mean(1).tolist())


def test_ms_ssim_is_torchmetrics_own_and_its_features_are_what_is_lost_of_it() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    own, made = pictures(2, 192), pictures(2, 192, 0.03)

    found = ms_ssim.measure(outcome(made), outcome(own))

    theirs = multiscale_structural_similarity_index_measure(
        made / 2 + 0.5, own / 2 + 0.5, data_range=1.0, reduction="none"
    )
    assert found.tolist() == pytest.approx(theirs.tolist(), abs=1e-6)
    lost = feature_distance(ms_ssim, made, own)  # plain windows in place of Gaussian ones
    assert lost.tolist() == pytest.approx((1 - found).tolist(), rel=0.5)


@pytest.mark.parametrize("side", [64, 160])
def test_ms_ssim_refuses_pictures_too_small_for_five_scales(side: int) -> None:
    with pytest.raises(QSearchError, match=f"from 176 pixels a side on; these are 3x{side}x{side}"):
        ms_ssim.measure(outcome(pictures(2, side)), outcome(pictures(2, side)))


# --------------------------------------------------------------------------------------------- CLIP


@pytest.mark.usefixtures("clip")
def test_clip_score_is_a_hundred_times_the_cosine() -> None:
    made = pictures(2, 24)
    texts = ("a red circle", "two blue squares")

    found = clip_score.measure(outcome(made, texts), outcome(made, texts))

    clip = load_clip(CPU)
    cosine = torch.cosine_similarity(directions(clip, made), clip.texts(texts))
    assert found.tolist() == pytest.approx((100 * cosine.clamp(min=0)).tolist(), abs=1e-4)


@pytest.mark.usefixtures("clip")
def test_clip_iqa_is_the_softmax_over_two_antonyms() -> None:
    made = pictures(2, 24)

    found = clip_iqa.measure(outcome(made), outcome(made))

    clip = load_clip(CPU)
    good, bad = (
        torch.cosine_similarity(directions(clip, made), clip.texts([t])) for t in clip_iqa.PAIR
    )
    sharp = float(clip.model.logit_scale.exp())
    assert found.tolist() == pytest.approx(torch.sigmoid(sharp * (good - bad)).tolist(), abs=1e-5)


@pytest.mark.usefixtures("clip")
def test_cmmd_is_the_formula_s() -> None:
    own, made = pictures(4, 24), pictures(4, 24, 0.5)

    found = cmmd.measure(outcome(made), outcome(own))

    a, b = (cmmd.embed(x).double().numpy() for x in (made, own))

    def kernel(x: Any, y: Any) -> float:
        return float(np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 200).mean())

    assert found == pytest.approx(1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)), rel=1e-6)


@pytest.mark.parametrize("name", ["clip_score", "clip_iqa", "cmmd"])
def test_without_clip_a_metric_says_what_to_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QSEARCH_CLIP", raising=False)
    made = outcome(pictures(3, 24))

    with pytest.raises(QSearchError, match=f"^{name} goes by CLIP: .* or leave {name} out$"):
        evaluate(made, made, [name])


@pytest.mark.usefixtures("clip")
@pytest.mark.parametrize("name", ["clip_score", "image_reward", "hps"])
def test_a_metric_of_texts_refuses_pictures_without_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Needs, "missing", ())
    made = outcome(pictures(3, 24), ("", "", ""))

    with pytest.raises(QSearchError, match=f"{name} compares pictures with their prompts"):
        evaluate(made, made, [name])


# --------------------------------------------------------------------------------------------- sets


def stirred(count: int, shift: float) -> Tensor:
    dice = torch.Generator().manual_seed(count)
    return torch.randn(count, 6, generator=dice) + shift


def test_fid_is_the_frechet_distance_of_two_sets_of_features() -> None:
    made, real = stirred(40, 0.5), stirred(60, 0.0)

    found = fid.distance(made, real)

    a, b = made.double().numpy(), real.double().numpy()
    root = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)).real.sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = means + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * root
    assert found == pytest.approx(expected, rel=1e-3)


def test_kid_is_the_unbiased_discrepancy_with_a_cubic_kernel() -> None:
    made, real = stirred(30, 0.5), stirred(30, 0.0)

    found = kid.distance(made, real)

    a, b = made.double().numpy(), real.double().numpy()
    k = [(x @ y.T / 6 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    n = 30
    within = [(m.sum() - np.trace(m)) / (n * (n - 1)) for m in k[:2]]
    assert found == pytest.approx(1000 * (sum(within) - 2 * k[2].mean()), rel=1e-4)
    assert kid.distance(made, real) == found


def plain_features(made: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(made, 2).flatten(1)


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd"])
def test_sets_are_compared_with_real_pictures_where_a_folder_is_given(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = plugins.load("metrics", name)
    monkeypatch.setattr(metric, "embed", plain_features)
    for i, picture in enumerate(pictures(12, 48)):
        data = ((picture.permute(1, 2, 0) / 2 + 0.5) * 255).round().byte().numpy()
        Image.fromarray(data).resize((96, 48)).save(tmp_path / f"{i}.png")
    made = outcome(pictures(12, 24, 0.3))
    given = outcome(pictures(12, 24), real=tmp_path)

    (mean, error) = evaluate(made, given, [name])[name]

    assert math.isfinite(mean)
    assert error > 0
    assert mean != evaluate(made, outcome(pictures(12, 24)), [name])[name][0]


@pytest.mark.parametrize("content", ["nothing", "one", "broken"])
def test_a_folder_of_real_pictures_that_is_none_is_one_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid, "embed", plain_features)
    for i in range({"nothing": 0, "one": 1, "broken": 3}[content]):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    made = outcome(pictures(4, 24))

    with pytest.raises(QSearchError, match=r"two or more of \.png|is no picture that can be read"):
        evaluate(made, outcome(pictures(4, 24), real=tmp_path), ["fid"])


# ---------------------------------------------------------------------- networks of other libraries


@pytest.mark.parametrize("name", ["lpips", "dists", "fid", "kid", "image_reward", "hps"])
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "torch_fidelity", "imscore"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("qsearch.measure.networks.find_spec", lambda name: None)
    made = outcome(pictures(4, 64))

    with pytest.raises(QSearchError, match=r"needs .*: pip install .*, or leave"):
        evaluate(made, made, [name])


@pytest.mark.parametrize("name", ["fid", "kid", "cmmd", "hps", "image_reward"])
def test_a_metric_without_gradients_is_refused_for_profiling(name: str) -> None:
    clean = PredictedX0(torch.zeros(1, 4, 2, 2), lambda _: pictures(1, 24), 4)

    with pytest.raises(QSearchError, match=f"{name} has no gradients"):
        measured([name], None, clean, None, clean)


@pytest.fixture
def random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder with networks of random weights under the names of the published files."""
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    save_hub(folder)
    for name in ("lpips", "dists"):
        plugins.load("metrics", name).network.cache_clear()
    return folder


def test_lpips_is_torchmetrics_own_and_that_of_its_features(random_weights: Path) -> None:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

    lpips, own, made = plugins.load("metrics", "lpips"), pictures(3, 64), pictures(3, 64, 0.2)

    found = lpips.measure(outcome(made), outcome(own))

    theirs = learned_perceptual_image_patch_similarity(made, own, "alex", reduction="none")
    assert found.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert feature_distance(lpips, made, own).tolist() == pytest.approx(found.tolist(), rel=1e-4)
    assert lpips.measure(outcome(own), outcome(own)).tolist() == [0.0] * 3


def test_dists_is_torchmetrics_own_and_its_features_are_it_to_second_order(
    random_weights: Path,
) -> None:
    from torchmetrics.functional.image import deep_image_structure_and_texture_similarity

    dists, own, made = plugins.load("metrics", "dists"), pictures(2, 64), pictures(2, 64, 0.02)

    found = dists.measure(outcome(made), outcome(own))

    theirs = deep_image_structure_and_texture_similarity(made / 2 + 0.5, own / 2 + 0.5)
    assert found.tolist() == pytest.approx(theirs.tolist(), rel=1e-4)
    assert feature_distance(dists, made, own).tolist() == pytest.approx(found.tolist(), rel=0.1)


@pytest.mark.parametrize("name", ["lpips", "dists"])
def test_missing_weights_are_one_line(
    name: str, random_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in random_weights.iterdir():
        file.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = outcome(pictures(2, 64))

    with pytest.raises(
        QSearchError, match=rf"{name} needs .*: put .* into .*checkpoints, or leave"
    ):
        evaluate(made, made, [name])


def test_inception_s_features_are_torchmetrics_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    pytest.importorskip("torch_fidelity")
    from torchmetrics.image.fid import FrechetInceptionDistance

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    save_hub(tmp_path / "hub" / "checkpoints")
    made = pictures(2, 64)

    found = fid.embed(made)

    theirs = FrechetInceptionDistance(2048).inception(as_bytes(made))
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "module", "kind", "scale"),
    [("image_reward", "imreward", "ImageReward", 1), ("hps", "hps", "HPSv2", 100)],
)
def test_rewards_are_imscore_s_own(
    name: str, module: str, kind: str, scale: int, tmp_path: Path
) -> None:
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    model = getattr(pytest.importorskip(f"imscore.{module}.model"), kind)
    made, texts = pictures(2, 64), ("a red circle", "two blue squares")

    with random_rewards(tmp_path):
        found = plugins.load("metrics", name).measure(outcome(made, texts), outcome(made, texts))
        theirs = model.from_pretrained("").eval().score(made / 2 + 0.5, list(texts))

    assert found.tolist() == pytest.approx((scale * theirs).flatten().tolist(), rel=1e-4)


def test_a_package_that_breaks_beside_another_is_one_line() -> None:
    with (
        pytest.raises(QSearchError, match=r"hps: json does not work .* no attribute 'ids'"),
        Needs("hps", ("json",)).loading(),
    ):
        raise AttributeError("BertTokenizer has no attribute 'ids'")


def test_too_few_pictures_for_a_metric_of_sets_are_said() -> None:
    from qsearch.stages.evaluate import too_few

    [said] = too_few(("sqnr", "fid", "noise"), 96)

    assert said.startswith("fid of 96 pictures is biased upwards and compares with no paper's")
    assert too_few(("sqnr", "fid"), 4096) == []
