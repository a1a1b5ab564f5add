"""Share of the caption's attributes that the judge finds in the picture: content, whatever the pixels."""

from __future__ import annotations

from torch import Tensor

from ...core.errors import QSearchError
from ...zoo import judge
from ..evaluation import Outcome

higher_is_better = True


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """Share a sample [N] in [0, 1]. Raises `QSearchError` for prompts that are not captions of the zoo's scenes."""
    if not outcome.prompts.captions:
        raise QSearchError("alignment needs captions of the zoo's scenes; these prompts are free text, leave the metric out")
    return judge.alignment(judge.load_judge(), outcome.pictures, outcome.prompts.captions)
