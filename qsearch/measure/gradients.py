"""Contraction: each weight's gradient meets what every choice does to the weight the moment it appears, and is freed.

So a backward never holds more than one weight's gradient beside the activations, and what is left of it is one number a choice.
The moves (quantized weight - weight) are made once and kept: making them anew would cost more than the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import QSearchError
from .observation import AbstractObservation
from .question import Question
from .simulation import weight_of


class Contraction:
    """`choices`: (layer, scheme) for every quantizable layer and scheme, in that order. With `squared`, squares of gradient and move are contracted.

    Raises `QSearchError` for schemes that round inputs: only weights are moved here.
    """

    def __init__(self, question: Question, *, squared: bool = False) -> None:
        self.model, self.schemes, self.squared = question.model, question.schemes, squared
        for scheme in self.schemes:
            if scheme.activation:
                raise QSearchError(f"probes move weights only; {scheme} rounds the layer's input as well: take {scheme.weight_only}, or the estimator sweep")
            if scheme.ranges > 1:
                raise QSearchError(f"probes move one weight for all steps; {scheme} has one for each range of them: take the estimator sweep")
        self.layers = [layer.name for layer in question.graph.quantizable]
        self.choices = tuple((layer, str(scheme)) for layer in self.layers for scheme in self.schemes)
        self._moves: dict[str, Tensor] = {}
        self._weights = question.weights
        self._sums: Tensor | None = None
        self._now: AbstractObservation | None = None

    def moves(self, layer: str) -> Tensor:
        """What each scheme adds to the layer's weight [schemes, weights], or its square, in the weight's own type."""
        if layer not in self._moves:
            weight = weight_of(self.model, layer).data
            made = self._weights()
            moves = torch.stack([(made.get(layer, s) - weight).flatten() for s in self.schemes])
            self._moves[layer] = moves.square() if self.squared else moves
        return self._moves[layer]

    @property
    def bytes(self) -> int:
        """Memory that the moves take."""
        return sum(weight_of(self.model, n).numel() * weight_of(self.model, n).element_size() for n in self.layers) * len(self.schemes)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, only the layers' weights want gradients, and a backward contracts them; the model is left as it was."""
        flags = {p: p.requires_grad for p in self.model.parameters()}
        with ExitStack() as stack:
            for parameter in flags:
                parameter.requires_grad_(False)
            stack.callback(lambda: [p.requires_grad_(flag) for p, flag in flags.items()])
            for i, name in enumerate(self.layers):
                weight = weight_of(self.model, name)
                self.moves(name)
                if weight.is_floating_point():
                    weight.requires_grad_(True)
                    handle = weight.register_post_accumulate_grad_hook(partial(self._contract, i, name))
                    stack.callback(handle.remove)
            yield

    def _contract(self, place: int, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        assert self._sums is not None
        assert self._now is not None
        gradient, moves = weight.grad.flatten(), self.moves(name)
        found = moves @ (gradient.square() if self.squared else gradient)
        n = len(self.schemes)
        self._sums[self._now.now, place * n : (place + 1) * n] += found
        weight.grad = None

    def of(self, target: Tensor, observation: AbstractObservation, *, retain: bool) -> NDArray[np.float32]:
        """Contract the gradients of the scalar `target`: [sampler steps, choices].

        A layer that the call does not run has no gradient and gets zeros. Raises `QSearchError` for the first layer whose gradient is not finite.
        """
        self._sums = torch.zeros(observation.sampler_steps, len(self.choices), device=target.device)
        self._now = observation
        target.backward(retain_graph=retain)
        sums, self._sums, self._now = self._sums, None, None
        found: NDArray[np.float32] = sums.cpu().numpy()
        if not np.isfinite(found).all():
            layer, scheme = self.choices[int(np.argwhere(~np.isfinite(found))[0][1])]
            raise QSearchError(
                f"the gradient of {layer} is not finite in step bin {observation.bin} (met at {scheme}); profile with another metric, or in fp32"
            )
        return found


def signs(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Random +1 and -1 from a seed, the same on every device."""
    return (torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1).to(device, torch.float32)
