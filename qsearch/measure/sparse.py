"""Sparse attention in any model: given modules' calls of torch's attention go to functions of ours.

Hooks put a torch function mode around each named module that calls `scaled_dot_product_attention`,
as diffusers' attention dispatch does in the end; the call's queries, keys and values go to what the
caller gave for that module, together with the sampler's step. What computes an attention, and what
it carries from step to step, is the caller's: `qsearch_kernels.carried_attention.SparseAttention`,
or anything with its two methods. An attention that it cannot stand for (a mask, causal, grouped
heads, cross-attention) is refused by name, and so is a module whose attention never came by: a plan
is never carried out in silence by doing nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..choices.attention import AbstractSparseAttention
from ..core.errors import QSearchError, nearest
from .attention import ARGUMENTS, check_whole


@contextmanager
def sparse_attention(
    model: nn.Module,
    attentions: Mapping[str, AbstractSparseAttention],
    step_of: Callable[[], int],
) -> Iterator[None]:
    """Inside, the attention of each named module is computed by what was given for it.

    What they carry is dropped at the beginning and at the end. Samplings in one context are told
    apart by a step that is earlier than the last; call `reset` where one begins later than that.

    Args:
        model: any model whose attention is torch's.
        attentions: name of the module that calls attention -> what computes it.
        step_of: the sampler's step now, as `StepClock.step`.

    Raises:
        QSearchError: for an unknown module; inside, for an attention that has a mask, is causal,
            has grouped heads, dropout, or keys of other tokens than its queries; for a module that
            computes attention in another way than torch's, or more than one in a call; and for
            what `attend` refuses, such as a batch that changed from one step to the next.
    """
    handles = route(model, attentions, step_of)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention in attentions.values():
            attention.reset()


def route(
    model: nn.Module,
    attentions: Mapping[str, AbstractSparseAttention],
    step_of: Callable[[], int],
) -> list[RemovableHandle]:
    """`sparse_attention` until the handles that are returned are removed."""
    modules = dict(model.named_modules())
    for name in attentions:
        if name not in modules:
            raise QSearchError(
                f"sparse attention is given to modules of the model; {name!r} is none"
                f"{nearest(name, modules)}"
            )
    handles = []
    for name, attention in attentions.items():
        routed = _Routed(name, attention, step_of)
        attention.reset()
        handles.append(modules[name].register_forward_pre_hook(routed.enter))
        handles.append(modules[name].register_forward_hook(routed.leave, always_call=True))
    return handles


class _Routed(TorchFunctionMode):
    """Sends a module's attention elsewhere; `seen` counts those of the call that is running."""

    def __init__(
        self, name: str, attention: AbstractSparseAttention, step_of: Callable[[], int]
    ) -> None:
        super().__init__()
        self.name, self.attention, self.step_of = name, attention, step_of
        self.seen = 0

    def enter(self, _: nn.Module, args: Any) -> None:
        """When the module begins."""
        self.seen = 0
        self.__enter__()  # type: ignore[no-untyped-call]  # torch does not say

    def leave(self, _: nn.Module, args: Any, output: Any) -> None:
        """When it ends; `output` is None where an exception ended it."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch does not say
        if not self.seen and output is not None:
            raise QSearchError(
                "sparse attention replaces calls of torch's "
                f"scaled_dot_product_attention; {self.name} made none: it computes attention "
                "in another way, or holds none"
            )

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Everything but attention passes as it is."""
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        self.seen += 1
        if self.seen > 1:
            raise QSearchError(
                f"a module with sparse attention calls attention once; {self.name} calls it more "
                "often: name the modules inside it"
            )
        called = {**dict(zip(ARGUMENTS, args, strict=False)), **given}
        check_whole(self.name, **called)
        return self._attend(called["query"], called["key"], called["value"], called.get("scale"))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        headless = query.ndim == 3
        q, k, v = (x[:, None] if headless else x for x in (query, key, value))
        try:
            made = self.attention.attend(q, k, v, scale=scale, step=self.step_of())
        except ValueError as error:
            raise QSearchError(f"{self.name}: {error}") from error
        return made[:, 0] if headless else made
