"""Attention's own tensors on their way through functions of ours: in any model that calls torch's attention, with no code per model.

Hooks put a torch function mode around the modules that call `scaled_dot_product_attention` (around them alone, since modes that surround a backward
are not seen by what it computes again): what passes by is named `MODULE:q` and so on (`core/sites.py`). Only where the softmax itself is wanted is attention computed step by step, with its whole matrix in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.errors import QSearchError
from ..core.sites import cut

Through = Callable[[Tensor], Tensor]
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@contextmanager
def passing(model: nn.Module, through: Mapping[str, Through]) -> Iterator[None]:
    """Inside, the tensor at each site goes through its function.

    Raises `QSearchError` where a module ran and no attention was seen in it: a plan must not be carried out in silence by doing nothing.
    """
    if not through:
        yield
        return
    wanted: dict[str, dict[str, Through]] = {}
    for site, function in through.items():
        module, part = cut(site)
        wanted.setdefault(module, {})[part] = function
    modules = dict(model.named_modules())
    held = {module: _Held(parts) for module, parts in wanted.items()}
    with ExitStack() as stack:
        for name, one in held.items():
            stack.callback(modules[name].register_forward_pre_hook(one.enter).remove)
            stack.callback(modules[name].register_forward_hook(one.leave, always_call=True).remove)
        yield
        if missed := [name for name, one in held.items() if one.ran and not one.seen]:
            raise QSearchError(
                f"sites are seen where a module calls torch's scaled_dot_product_attention; {missed[0]} computes attention in another way: leave its sites out"
            )


class _Held(TorchFunctionMode):
    """Sends the tensors of a module's attention through functions. `ran`: the module did; `seen`: its attention came by."""

    def __init__(self, through: Mapping[str, Through]) -> None:
        super().__init__()
        self.through = through
        self.ran = self.seen = False

    def enter(self, _: nn.Module, args: Any) -> None:
        """When the module begins."""
        self.ran = True
        self.__enter__()  # type: ignore[no-untyped-call]  # torch does not say

    def leave(self, _: nn.Module, args: Any, output: Any) -> None:
        """When it ends, also by an exception."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch does not say

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
        self.seen = True
        return _attention(self.through, **{**dict(zip(_ARGUMENTS, args, strict=False)), **given})


def _attention(
    through: Mapping[str, Through], query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> Tensor:
    query, key, value = (
        through[part](x) if part in through else x
        for part, x in (("q", query), ("k", key), ("v", value))
    )
    if "softmax" in through:
        made = step_by_step(query, key, value, weights=through["softmax"], **settings)
    else:
        made = F.scaled_dot_product_attention(query, key, value, **settings)
    return through["output"](made) if "output" in through else made


def step_by_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    weights: Through = lambda x: x,
) -> Tensor:
    """`scaled_dot_product_attention` as its documentation defines it, the softmax [..., queries, keys] going through `weights`."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (
        query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    )
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    return F.dropout(weights(scores.softmax(-1)), dropout_p) @ value
