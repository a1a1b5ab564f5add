"""Differentiable: what torch raises where a model can't be gone through backwards, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core.errors import QSearchError

#: words of torch's errors about gradients
_OF_GRADIENTS = ("grad", "backward", "derivative", "inplace", "in-place")


@contextmanager
def differentiable() -> Iterator[None]:
    """Turns what torch raises where a model can't be gone through backwards into one line.

    Raises:
        QSearchError: an operation has no backward, or writes over what its backward needs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        said = " ".join(str(error).split())
        if not any(word in said for word in _OF_GRADIENTS):
            raise
        raise QSearchError(
            f"probes go backwards through the model, and torch can't: {said[:300]}; take the "
            "estimator sweep, which goes forwards alone"
        ) from error
