"""Contraction: every gradient is contracted with the quantization errors of its weight, input or
site in the backward hook, and freed: one gradient is live at a time.

So a backward never holds more than one gradient beside the activations, and what is left of it is
one number a choice. The deltas of weights (quantized weight - weight) are made once and kept where
they take little memory: making them anew costs about what a forward does. There the gradients of a
few probes are gathered, too: one product of matrices reads the deltas once for all of them, so that
more choices cost next to nothing. Of a streamed model gradients are gathered while their unit is
loaded, and its deltas are made then, for all probes at once. Whatever type weights have, products
are summed in fp32. Inputs, and the tensors of attention, are rounded when their gradient comes,
from what the backward keeps of them anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..choices.fake_quantization import site_rounding
from ..choices.input_quantizer import with_first, words_of
from ..core.errors import QSearchError
from ..core.scheme import Scheme
from ..core.sites import cut
from ..core.steps import clock_of
from .attention import passing
from .differentiable import check_reached, differentiable
from .estimation import EstimationTask
from .memory import requires_grad_only, saved_activation_bytes, weight_bytes
from .observation import AbstractObservation
from .priced_attention import PricedAttention
from .quantized_weights import weight_of
from .simulation import roots
from .streaming import streams_of

#: deltas of weights that take no more bytes than this are kept; others are made again at every
#: backward
KEPT = 4 * 2**30
#: gradients of a weight that wait for each other, where deltas are kept
_GATHERED = 8
#: bytes of gradients that wait while a unit of a streamed model is there
_WAITING = 2**30
_AT_ONCE = 2**22  # entries of weights that are widened to fp32 at once


class _Priced(torch.autograd.Function):
    """The tensor as it is; in the backward, `contract(tensor, gradient)`. The tensor is saved as
    autograd saves its own, so checkpointing frees it too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, contract: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.contract = contract
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.contract(x, gradients[0])
        return gradients[0] if ctx.needs_input_grad[0] else None, None, None


class Contraction:
    """`choices`: (site, scheme) for every layer and site with its schemes, in that order. With
    `squared`, squares of gradient and delta are contracted.

    A scheme that rounds weight and input has the sum of both shares (of squares likewise). Raises
    `QSearchError` for schemes that do more.
    """

    def __init__(self, task: EstimationTask, *, squared: bool = False) -> None:
        self.task, self.model, self.squared = task, task.model, squared
        for scheme in task.schemes:
            for word in words_of(scheme) if scheme.format != "keep" else ():
                if word.plugin.unseen:
                    raise QSearchError(
                        f"probes move weights and inputs; {scheme} also has {word.plugin.unseen}: "
                        f"take it without ~{word.name}, or the estimator sweep"
                    )
        self.choices = tuple(
            (site, str(scheme)) for site, schemes in task.choices.items() for scheme in schemes
        )
        place = {choice: i for i, choice in enumerate(self.choices)}
        self._stored: dict[
            str, dict[Scheme, list[int]]
        ] = {}  # layer -> what is stored -> the choices that store it
        self._read: dict[
            str, dict[Scheme, list[int]]
        ] = {}  # layer or site -> how it is read -> the choices that read it so
        for site, schemes in task.choices.items():
            for scheme in schemes:
                if scheme.format != "keep":
                    self._stored.setdefault(site, {}).setdefault(
                        scheme if scheme.transforms else scheme.weight_only, []
                    ).append(place[site, str(scheme)])
                if scheme.activation:
                    read = (
                        scheme
                        if scheme.transforms
                        else Scheme("keep", activation=scheme.activation, grain=scheme.grain)
                    )
                    self._read.setdefault(site, {}).setdefault(read, []).append(
                        place[site, str(scheme)]
                    )
        self._whole_attentions = {
            site: {s: [place[site, str(s)]] for s in schemes if s.attention}
            for site, schemes in task.choices.items()
            if any(s.attention for s in schemes)
        }
        self._moves: dict[str, Tensor] = {}
        self._weights = task.weights()
        self._anchor = torch.zeros((), requires_grad=True)
        self._waiting: dict[
            str, list[tuple[int, int, Tensor]]
        ] = {}  # layer -> (probe, sampler step, gradient)
        self._sums: Tensor | None = None
        self._now: tuple[int, AbstractObservation] | None = None
        self._met: set[str] = set()  # layers whose weights had a gradient that is not zero
        self._looked: set[AbstractObservation] = set()  # whose layers without one were looked at
        self._streams = streams_of(self.model)

    @property
    def memory(self) -> str:
        """In words, what a backward takes: one pass is made to see, but where weights are
        streamed.
        """
        if self._streams:
            largest = max(stream.largest for stream in self._streams)
            return (
                f"weights one block of {largest / 2**30:.2f} GiB at a time and the next one read "
                "ahead, gradients and quantized weights of one block"
            )
        weights, kept = (
            weight_bytes(self.model),
            saved_activation_bytes(self.model, self.task.observations[0].example()),
        )
        made = "" if self.keeps else ", made anew each time"
        return (
            f"{weights / 2**30:.2f} GiB of weights, {kept / 2**30:.2f} GiB of activations and "
            f"{self.bytes / 2**30:.2f} GiB of quantized weights{made}"
        )

    @property
    def bytes(self) -> int:
        """Memory that the deltas of weights and the gathered gradients take: all of them, or one
        delta where they are made again each time.
        """
        return (
            self._whole
            if self.keeps
            else max(
                (
                    weight_of(self.model, n).numel() * weight_of(self.model, n).element_size()
                    for n in self._stored
                ),
                default=0,
            )
        )

    @cached_property
    def keeps(self) -> bool:
        """Whether deltas of weights are kept."""
        return not self._streams and self._whole <= KEPT

    @cached_property
    def _whole(self) -> int:
        waiting = min(_GATHERED, self.task.probes)
        sizes = {
            n: weight_of(self.model, n).numel() * weight_of(self.model, n).element_size()
            for n in self._stored
        }
        return sum((len(made) + waiting) * sizes[n] for n, made in self._stored.items())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, a backward contracts the gradients of weights, inputs and sites; the model is
        left as it was.
        """
        with ExitStack() as stack:
            stack.enter_context(
                requires_grad_only(
                    self.model, {weight_of(self.model, name) for name in self._stored}
                )
            )
            for name in self._stored:
                weight = weight_of(self.model, name)
                if self.keeps:
                    self._moves[name] = torch.stack(list(self._made(name)))
                if weight.requires_grad:
                    stack.callback(
                        weight.register_post_accumulate_grad_hook(
                            partial(self._contract_weight_grad, name)
                        ).remove
                    )
            sites: dict[str, Any] = {}
            for name, variants in self._whole_attentions.items():
                sites[name] = PricedAttention(
                    self.task.graph.self_attentions[cut(name)[0]],
                    variants,
                    clock_of(roots(self.model, self.task.graph)[0]),
                    self.task.ranges,
                    self._weights.drifts,
                    self._watch,
                    self._add_now,
                    squared=self.squared,
                )
            for name, read in self._read.items():
                if name in self.task.sites:
                    sites[name] = self._priced(
                        partial(
                            self._contract_input_grad,
                            [(site_rounding(scheme), at) for scheme, at in read.items()],
                        )
                    )
                else:
                    stack.callback(self._watched(name, read).remove)
            stack.enter_context(passing(self.model, sites))
            for stream in self._streams:
                stream.done.append(self._contract_waiting)
                stack.callback(stream.done.remove, self._contract_waiting)
            yield

    def _made(self, layer: str) -> Iterator[Tensor]:
        """What each way to store the layer's weight adds to it [weights], or its square, in the
        weight's own type.
        """
        weight, made = weight_of(self.model, layer).data, self.task.weights()
        for scheme in self._stored[layer]:
            delta = (made.get(layer, scheme) - weight).flatten()
            if not self.task.shared:
                made.forget(layer)
            yield delta.square_() if self.squared else delta

    def _watched(self, layer: str, read: dict[Scheme, list[int]]) -> Any:
        module = self.model.get_submodule(layer)
        variants = []
        for scheme, at in read.items():
            input_quantizer = self._weights.input_quantizer(layer, scheme)
            assert input_quantizer is not None, f"{scheme} does nothing to the input of {layer}"
            variants.append((input_quantizer.effective, at))
        through = self._priced(partial(self._contract_input_grad, variants))

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return with_first(through, args, kwargs)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def _priced(self, contract: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], Tensor]:
        def through(x: Tensor) -> Tensor:
            return self._watch(x, contract) if torch.is_grad_enabled() else x

        return through

    def _watch(self, x: Tensor, contract: Callable[[Tensor, Tensor], None]) -> Tensor:
        made: Tensor = _Priced.apply(x, self._anchor, contract)  # type: ignore[no-untyped-call]  # autograd's
        return made

    def _add_now(self, variants: Sequence[list[int]], shares: Tensor) -> None:
        """`_add` for the probe and the sampler step of now."""
        assert self._now is not None
        self._add(variants, shares, self._now[0], self._now[1].now)

    def _add(self, variants: Sequence[list[int]], shares: Tensor, probe: int, step: int) -> None:
        """Give each choice the share of its variant: `variants` lists the choices of each of
        `shares`.
        """
        assert self._sums is not None
        at = [i for variant in variants for i in variant]
        own = shares.float()[[k for k, variant in enumerate(variants) for _ in variant]]
        self._sums[probe, step, at] += own.to(self._sums.device)  # layers may lie on several

    def _contract_weight_grad(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None and self._now is not None
        gradient, place = weight.grad.flatten(), (self._now[0], self._now[1].now)
        weight.grad = None
        if name not in self._met and gradient.any():
            self._met.add(name)
        gradient = gradient.square() if self.squared else gradient
        waiting = self._waiting.setdefault(name, [])
        waiting.append((*place, gradient))
        if self._streams:
            held = sum(g.nbytes for many in self._waiting.values() for _, _, g in many)
            full = held > _WAITING
        else:
            full = not self.keeps or len(waiting) == _GATHERED
        if full:
            self._contract(name)

    def _contract_waiting(self) -> None:
        """Contract all gradients that wait."""
        for name in list(self._waiting):
            self._contract(name)

    def _contract(self, name: str) -> None:
        """Contract the gathered gradients of a layer with its deltas."""
        waiting, variants = self._waiting.pop(name), list(self._stored[name].values())
        gradients = torch.stack([gradient for _, _, gradient in waiting])
        with torch.autocast(gradients.device.type, enabled=False):
            if name in self._moves:
                found = _products(self._moves[name], gradients)
            else:
                found = torch.cat([_products(m[None], gradients) for m in self._made(name)])
        for shares, (probe, step, _) in zip(found.T, waiting, strict=True):
            self._add(variants, shares, probe, step)

    def _contract_input_grad(
        self,
        variants: Sequence[tuple[Callable[[Tensor], Tensor], list[int]]],
        x: Tensor,
        gradient: Tensor,
    ) -> None:
        assert self._now is not None
        found = []
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for changed, _ in variants:
                product = gradient.float() * (changed(x) - x).float()
                found.append((product.square() if self.squared else product).sum())
        self._add_now([at for _, at in variants], torch.stack(found))

    def of(
        self,
        features: Tensor,
        seeds: Sequence[int],
        observation: AbstractObservation,
        *,
        retain: bool,
    ) -> NDArray[np.float32]:
        """Contract the gradients of `features` along a sign vector from each seed: [seeds, sampler
        steps, choices]. `retain` the graph for more of them.

        Layers that the call does not run get zeros; `QSearchError` for one of no finite gradient.
        """
        self._sums = torch.zeros(
            len(seeds), observation.sampler_steps, len(self.choices), device=features.device
        )

        def now(k: int) -> None:
            self._now = k, observation

        with ExitStack() as stack:
            for stream in self._streams:  # so that the probes go through each unit together
                stack.enter_context(stream.gathering(now))
            stack.enter_context(differentiable())
            for k, seed in enumerate(seeds):
                now(k)
                (features * signs(features.shape, seed, features.device)).sum().backward(
                    retain_graph=retain or k < len(seeds) - 1
                )
        self._contract_waiting()
        if observation not in self._looked:
            self._looked.add(observation)
            check_reached(self.model, self.task.graph, set(self._stored), self._met, observation)
        sums, self._sums, self._now = self._sums, None, None
        found: NDArray[np.float32] = sums.cpu().numpy()
        if not np.isfinite(found).all():
            layer, scheme = self.choices[int(np.argwhere(~np.isfinite(found))[0][2])]
            raise QSearchError(
                f"the gradient of {layer} is not finite in step bin {observation.bin} "
                f"(met at {scheme}); profile with another metric, or in fp32"
            )
        return found


def _products(deltas: Tensor, gradients: Tensor) -> Tensor:
    """deltas [M, weights] times gradients [G, weights], summed in fp32: [M, G]."""
    if deltas.dtype == torch.float32:
        return deltas @ gradients.T
    parts = zip(deltas.split(_AT_ONCE, 1), gradients.split(_AT_ONCE, 1), strict=True)
    made = [delta.float() @ gradient.float().T for delta, gradient in parts]
    return torch.stack(made).sum(0)


def signs(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Random +1 and -1 from a seed, the same on every device."""
    return (
        torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
        * 2
        - 1
    ).to(device, torch.float32)
