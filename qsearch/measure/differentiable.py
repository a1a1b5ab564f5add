"""Differentiable: where a model can't be gone through backwards, in one line: what torch raises,
and layers that the output depends on without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from .observation import AbstractObservation

#: words of torch's errors about gradients
_OF_GRADIENTS = ("grad", "backward", "derivative", "inplace", "in-place")
#: share of a metric's scale beyond which its features have changed
_CHANGED = 1e-8


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


def check_reached(
    model: nn.Module,
    graph: OpGraph,
    asked: Set[str],
    reached: Set[str],
    observation: AbstractObservation,
) -> None:
    """Refuse a component that runs and that no gradient reaches, and a layer without gradient on
    which the features depend: their choices would all be priced at nothing.

    Args:
        model: what `graph` describes.
        graph: says which component a layer belongs to.
        asked: layers whose weights have choices.
        reached: those whose weights had a gradient other than zero.
        observation: what the gradients were of.

    Raises:
        QSearchError: names the component or the layer.
    """
    components = {graph.component(name) for name in asked}
    for component in observation.components:
        if component in components - {graph.component(name) for name in reached}:
            raise QSearchError(
                f"no gradient reaches the weights of {component}: the pipeline calls "
                "it without gradients, or what is measured does not depend on it. Leave it "
                "out of components, or take the estimator sweep"
            )
    rest = [n for n in sorted(asked - reached) if graph.component(n) in observation.components]
    if rest and (hidden := _changing(model, rest, observation)):
        raise QSearchError(
            f"the output depends on {hidden}, and no gradient reaches its weight: the model "
            "detaches what it makes, or rounds it. Take the estimator sweep, or keep the layer"
        )


@torch.no_grad()
def _changing(
    model: nn.Module, layers: Sequence[str], observation: AbstractObservation
) -> str | None:
    """The first of `layers` whose output the observation's features depend on; None: none is."""

    def depends(on: Sequence[str]) -> bool:
        with ExitStack() as stack:
            for name in on:
                layer = model.get_submodule(name)
                stack.callback(layer.register_forward_hook(_louder).remove)
            found = observation.features()
        return any(
            float((features - observation.reference[metric]).double().square().sum())
            > _CHANGED * float(observation.scale[metric].sum())
            for metric, features in found.items()
        )

    if not depends(layers):
        return None
    return next((name for name in layers if depends([name])), layers[0])


def _louder(layer: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    """The output without its bias, each number times another factor between 0.5 and 1.5: as weights
    that are moved would do, not at all where the input is zero.
    """
    if not isinstance(output, Tensor):
        return output
    made, bias, weight = output, getattr(layer, "bias", None), layer.weight
    if isinstance(bias, Tensor) and isinstance(weight, Tensor):
        behind = weight.ndim - 2  # axes of a convolution's space
        made = output - bias.reshape(-1, *[1] * behind).to(output)
    factors = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return output + made * factors.to(output)
