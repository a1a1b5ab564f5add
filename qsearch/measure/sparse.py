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
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.errors import QSearchError, nearest

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class AbstractSparseAttention(Protocol):
    """What stands for one module's attention; its mistakes in input are `ValueError`s."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, step: int) -> Tensor:
        """The output [batch, heads, T, head size] at a sampler's step."""

    def reset(self) -> None:
        """A sampling begins: nothing is carried over from the one before."""


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
    modules = dict(model.named_modules())
    for name in attentions:
        if name not in modules:
            raise QSearchError(
                f"sparse attention is given to modules of the model; {name!r} is none"
                f"{nearest(name, modules)}"
            )
    with ExitStack() as stack:
        for name, attention in attentions.items():
            routed = _Routed(name, attention, step_of)
            attention.reset()
            stack.callback(attention.reset)
            hooked = modules[name]
            stack.callback(hooked.register_forward_pre_hook(routed.enter).remove)
            stack.callback(hooked.register_forward_hook(routed.leave, always_call=True).remove)
        yield


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
                "sparse attention is heard where a module calls torch's "
                f"scaled_dot_product_attention; {self.name} was not heard: it computes attention "
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
        return self._attend(**{**dict(zip(_ARGUMENTS, args, strict=False)), **given})

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        for fault, wrong in (
            ("a mask of its own", attn_mask is not None),
            ("a causal mask", is_causal),
            (f"dropout of {dropout_p}", dropout_p > 0.0),
            (f"{query.ndim} dimensions", query.ndim not in (3, 4)),
            ("grouped heads", query.ndim == 4 and key.ndim == 4 and key.shape[1] != query.shape[1]),
            (
                f"{query.shape[-2]} queries and {key.shape[-2]} keys: cross-attention",
                query.shape[-2] != key.shape[-2],
            ),
        ):
            if wrong:
                raise QSearchError(
                    "sparse attention stands for self-attention of all tokens, without a mask, "
                    f"dropout or grouped heads; {self.name} has {fault}: leave it dense"
                )
        headless = query.ndim == 3
        q, k, v = (x[:, None] if headless else x for x in (query, key, value))
        try:
            made = self.attention.attend(q, k, v, scale=scale, step=self.step_of())
        except ValueError as error:
            raise QSearchError(f"{self.name}: {error}") from error
        return made[:, 0] if headless else made
