"""Rewards: models that score a picture for its prompt, from imscore, which ports them to one
interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core.errors import QSearchError
from .evaluation import Outcome
from .networks import Needs, a_sample, each_frame
from .pipelines import Prompts

_BATCH = 8


def check_texts(metric: str, prompts: Prompts) -> None:
    """Refuse pictures that were made without a text.

    Args:
        metric: its name, for the error.
        prompts: what is sampled.

    Raises:
        QSearchError: none of the prompts has a text.
    """
    if not any(prompts.texts):
        raise QSearchError(f"{metric} compares pictures with their prompts; these have none")


@torch.no_grad()
def scores(module: str, kind: str, needs: Needs, outcome: Outcome) -> Tensor:
    """What one of imscore's models says of every picture for its prompt.

    Args:
        module: imscore's module.
        kind: the model's class in it.
        needs: package and weights; its `file` is the repository on the hub.
        outcome: pictures in [-1, 1] and prompts.

    Returns:
        Scores [N]; of a video the mean over its frames.
    """
    check_texts(needs.metric, outcome.prompts)
    frames = each_frame(outcome.pictures)
    texts = [t for t in outcome.prompts.texts for _ in range(len(frames) // len(outcome.prompts))]
    model = _load(module, kind, needs, outcome.pictures.device)
    found = [
        model.score(part / 2 + 0.5, texts[i * _BATCH : i * _BATCH + len(part)]).flatten()
        for i, part in enumerate(frames.split(_BATCH))
    ]
    return a_sample(torch.cat(found), len(outcome.pictures))


@cache
def _load(module: str, kind: str, needs: Needs, device: torch.device) -> Any:
    with needs.loading(), _former_names():
        model = getattr(importlib.import_module(module), kind).from_pretrained(needs.file)
        return model.eval().requires_grad_(False).to(device)


@contextmanager
def _former_names() -> Iterator[None]:
    """`additional_special_tokens_ids`, which imscore's ImageReward reads of BERT's tokenizer and
    transformers 5 renamed.
    """
    from transformers import BertTokenizer

    name = "additional_special_tokens_ids"
    if hasattr(BertTokenizer, name):
        yield
        return
    ids = property(lambda self: self.convert_tokens_to_ids(self.extra_special_tokens))
    setattr(BertTokenizer, name, ids)
    try:
        yield
    finally:
        delattr(BertTokenizer, name)
