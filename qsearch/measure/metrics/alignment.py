"""Share of the caption's attributes that the judge finds in the picture: content, whatever the pixels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...core.errors import QSearchError
from ...zoo import judge
from ..clean import Clean
from ..evaluation import Outcome

higher_is_better = True


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Share a sample [N] in [0, 1]. Raises `QSearchError` for prompts that are not captions of the zoo's scenes."""
    if not outcome.prompts.captions:
        raise QSearchError("alignment needs captions of the zoo's scenes; these prompts are free text, leave the metric out")
    return judge.alignment(judge.load_judge(), outcome.pictures, outcome.prompts.captions)


def features(made: Clean, reference: Clean) -> tuple[Tensor, Tensor]:
    """What the judge reads, as square roots of its heads' probabilities: the squared distance over the number of answers is twice Hellinger's.

    Raises `QSearchError` for pictures of another world: the judge knows the zoo's 64x64 scenes only.
    """
    pictures = made.pictures
    if pictures.shape[1:] != (3, 64, 64):
        raise QSearchError(f"the judge reads the zoo's scenes of 3x64x64; these pictures are {'x'.join(map(str, pictures.shape[1:]))}: leave alignment out")
    read = _judge(pictures.device)(pictures)
    roots = [torch.softmax(logits, -1).clamp(min=1e-12).sqrt().flatten(1) for logits in read.values()]
    answers = sum(logits[0, ..., 0].numel() for logits in read.values())
    return torch.cat(roots, 1), torch.full((len(pictures),), float(answers), dtype=torch.float64, device=pictures.device)


@cache
def _judge(device: torch.device) -> judge.Judge:
    return judge.load_judge().to(device)
