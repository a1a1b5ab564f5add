"""Each metric against the number of its own library's call, on fixed pictures.

    PYTHONPATH=. python notebooks/figures/metrics.py [--pictures 4]

Pictures are the zoo's scenes, scaled up, and the same with noise. Networks have random weights in
the places where their libraries look for the published ones, so that no network is needed: both
sides load the same file, each by its own code. LPIPS' linear weights come with torchmetrics.
`library` says whose call the other number is (of CMMD the paper's equation in float64: no package
has it), `largest difference` is over pictures and relative to the largest value. A metric whose
package is missing has no numbers: all of them are there after `pip install -e '.[metrics]'`. Writes
metrics.json.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from figure import publish
from torch import Tensor

from qsearch.core import plugins
from qsearch.measure.evaluation import Outcome
from qsearch.measure.networks import as_bytes
from qsearch.measure.pipelines import Prompts
from qsearch.zoo.scenes import describe, draw_scenes, render
from tests.measure import metric_networks

SIDE, NOISE = 192, 0.15
#: pictures of full precision, the same made by a plan, and their captions
Case = tuple[Tensor, Tensor, tuple[str, ...]]
UNIT: dict[str, Any] = {"data_range": 1.0, "reduction": "none"}


def case(count: int) -> Case:
    """Pictures [N, 3, SIDE, SIDE] in [-1, 1] with and without noise, as a PNG holds them."""
    dice = torch.Generator().manual_seed(0)
    scenes = draw_scenes(count, dice)
    large = F.interpolate(render(scenes), (SIDE, SIDE), mode="bicubic").clamp(-1, 1)
    noisy = large + NOISE * torch.randn(large.shape, generator=dice)
    own, made = (as_bytes(x).float() / 127.5 - 1 for x in (large, noisy))
    return own, made, tuple(c.text for c in describe(scenes, dice))


def psnr(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    from torchmetrics.functional.image import peak_signal_noise_ratio as call

    pairs = zip(made / 2 + 0.5, own / 2 + 0.5, strict=True)
    return torch.stack([call(a, b, data_range=1.0) for a, b in pairs])


def ssim(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure as call

    return torch.as_tensor(call(made / 2 + 0.5, own / 2 + 0.5, **UNIT))


def ms_ssim(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    from torchmetrics.functional.image import (
        multiscale_structural_similarity_index_measure as call,
    )

    return torch.as_tensor(call(made / 2 + 0.5, own / 2 + 0.5, **UNIT))


def lpips(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as call

    return call(made, own, "alex", reduction="none")


def dists(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    from torchmetrics.functional.image import deep_image_structure_and_texture_similarity as call

    return call(made / 2 + 0.5, own / 2 + 0.5)


def _logits(made: Tensor, texts: tuple[str, ...]) -> tuple[Tensor, float]:
    """transformers' own logits of pictures and texts [N, T], and their temperature."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    folder = os.environ["QSEARCH_CLIP"]
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(list(texts), return_tensors="pt", padding=True)
    seen = CLIPImageProcessor.from_pretrained(folder)(list(as_bytes(made)), return_tensors="pt")
    words = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return model(**words, **seen).logits_per_image, float(model.logit_scale.exp())


def clip_score(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    logits, sharp = _logits(made, texts)
    return 100 * (logits.diagonal() / sharp).clamp(min=0)


def clip_iqa(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    logits, _ = _logits(made, ("Good photo.", "Bad photo."))
    return logits.softmax(-1)[:, 0]


def cmmd(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    """Equations 3 and 4, with the biased estimator and sigma 10."""
    embed = plugins.load("metrics", "cmmd").embed
    a, b = embed(made).double(), embed(own).double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-(x[:, None] - y[None]).square().sum(-1) / 200).exp().mean()

    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def fid(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    """The whole of torchmetrics' metric, network and all."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(2048).set_dtype(torch.float32)
    metric.update(as_bytes(own), real=True)
    metric.update(as_bytes(made), real=False)
    made_by_it: Tensor = metric.compute()
    return made_by_it


def kid(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    """The same of all pictures as one subset."""
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(2048, subsets=1, subset_size=len(own))
    metric.update(as_bytes(own), real=True)
    metric.update(as_bytes(made), real=False)
    return 1000 * metric.compute()[0]


def _imscore(module: str, kind: str, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    model = getattr(import_module(f"imscore.{module}.model"), kind)
    network = model.from_pretrained("").eval()
    scores: Tensor = network.score(made / 2 + 0.5, list(texts)).flatten()
    return scores


def image_reward(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    return _imscore("imreward", "ImageReward", made, texts)


def hps(own: Tensor, made: Tensor, texts: tuple[str, ...]) -> Tensor:
    return 100 * _imscore("hps", "HPSv2", made, texts)


#: metric -> (whose number, its call, modules that it needs)
LIBRARIES: dict[str, tuple[str, Callable[..., Tensor], tuple[str, ...]]] = {
    "psnr": ("torchmetrics", psnr, ()),
    "ssim": ("torchmetrics", ssim, ()),
    "ms_ssim": ("torchmetrics", ms_ssim, ()),
    "lpips": ("torchmetrics", lpips, ("torchvision",)),
    "dists": ("torchmetrics", dists, ("torchvision",)),
    "clip_score": ("transformers", clip_score, ()),
    "clip_iqa": ("transformers", clip_iqa, ()),
    "cmmd": ("equations 3 and 4", cmmd, ()),
    "image_reward": ("imscore", image_reward, ("torchvision", "imscore")),
    "hps": ("imscore", hps, ("torchvision", "imscore")),
    "fid": ("torchmetrics", fid, ("torchvision", "torch_fidelity")),
    "kid": ("torchmetrics", kid, ("torchvision", "torch_fidelity")),
}


def row(name: str, given: Case) -> dict[str, Any]:
    """Both numbers of a metric: means over the pictures, and how far they are apart."""
    whose, theirs, modules = LIBRARIES[name]
    found: dict[str, Any] = {"metric": name, "library": whose}
    if any(find_spec(m) is None for m in modules):
        return found | {"ours": math.nan, "theirs": math.nan, "largest difference": math.nan}
    own, made, texts = given
    reference, outcome = (
        Outcome(Prompts(texts), torch.zeros(len(x), 4, 2, 2), x, ()) for x in (own, made)
    )
    ours = torch.as_tensor(plugins.load("metrics", name).measure(outcome, reference)).double()
    wanted = theirs(own, made, texts).double().detach()
    off = float((ours - wanted).abs().max() / wanted.abs().max())
    values = {"ours": float(ours.mean()), "theirs": float(wanted.mean())}
    return found | values | {"largest difference": off}


def main() -> None:
    """Compare and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCH_HOME": folder, "QSEARCH_CLIP": f"{folder}/clip"}
        metric_networks.save_clip(Path(folder, "clip"), side=SIDE // 2)  # both sides scale pictures
        metric_networks.save_hub(Path(folder, "hub", "checkpoints"))
        given = case(options.pictures)
        with ExitStack() as stack:
            if find_spec("imscore") is not None:
                stack.enter_context(metric_networks.random_rewards(Path(folder, "rewards")))
            rows = [row(name, given) for name in LIBRARIES]
    publish(__file__, rows, title="metrics against their libraries", seed=0)


if __name__ == "__main__":
    main()
