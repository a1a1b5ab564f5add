"""Structural similarity of the pictures to those of full precision: content in place (torchmetrics' SSIM)."""

from __future__ import annotations

from torch import Tensor

from ..evaluation import Outcome

higher_is_better = True


def measure(outcome: Outcome, reference: Outcome) -> Tensor:
    """SSIM a sample [N] in [-1, 1], on pictures scaled to [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    value = ssim(outcome.pictures / 2 + 0.5, reference.pictures / 2 + 0.5, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value
