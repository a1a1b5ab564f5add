"""Networks of metrics with random weights, in the places where their libraries look for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from qsearch.measure import rewards
from qsearch.zoo.painters import MAX_WORDS, new_tokenizer
from qsearch.zoo.scenes import vocabulary

#: file in torch.hub's folder -> torchvision's network
TORCHVISION = {"alexnet-owt-7be5be79.pth": "alexnet", "vgg16-397923af.pth": "vgg16"}
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


def save_clip(folder: Path, side: int = 12) -> None:
    """A CLIPModel of one layer with tokenizer and preprocessor, for pictures of `side` pixels."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer(True, (*vocabulary(), "Good", "Bad", "photo", "."))
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_WORDS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    }
    CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config={**sizes, "image_size": side, "patch_size": 4},
            projection_dim=8,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)


def save_hub(folder: Path) -> None:
    """AlexNet, VGG-16 and FID's Inception under the names of their published files, as far as
    torchvision and torch-fidelity are installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if find_spec("torchvision") is None:
        return
    torchvision = import_module("torchvision")
    for file, kind in TORCHVISION.items():
        torch.save(getattr(torchvision.models, kind)(weights=None).state_dict(), folder / file)
    if find_spec("torch_fidelity") is None:
        return
    kind = import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    torch.save({}, folder / INCEPTION)
    with patch.object(kind, "load_state_dict", lambda self, state: None):
        made = kind("inception-v3-compat", ["2048"], str(folder / INCEPTION))
    for weight in made.parameters():  # as large at the end as at the beginning
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight)
    torch.save(made.state_dict(), folder / INCEPTION)


@contextmanager
def random_rewards(folder: Path) -> Iterator[None]:
    """imscore's models with random weights: `from_pretrained` makes them, HPSv2 of ViT-B-32, and
    ImageReward with a tokenizer of the zoo's words, which `folder` holds.
    """
    imreward, hps = (import_module(f"imscore.{name}.model") for name in ("imreward", "hps"))
    own, make = imreward.BertTokenizer, hps.create_model_and_transforms
    reward = imreward.ImageReward
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    own(str(folder / "vocab.txt")).save_pretrained(folder)
    read = own.from_pretrained

    def small(name: str, weights: str, **more: Any) -> Any:
        return make("ViT-B-32", None, **more)

    def of(kind: Any) -> Any:
        torch.manual_seed(0)
        return kind()

    with (
        rewards._former_names(),
        patch.object(own, "from_pretrained", lambda name: read(folder)),
        patch.object(hps, "create_model_and_transforms", small),
        patch.object(hps.HPSv2, "from_pretrained", lambda name: of(hps.HPSv2)),
        patch.object(reward, "from_pretrained", lambda name: of(reward)),
    ):
        yield
