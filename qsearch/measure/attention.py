"""Attention's own tensors on their way through functions of ours: in any model that calls torch's
attention, with no code per model.

Hooks put a torch function mode around the modules that call `scaled_dot_product_attention` (around
them alone, since modes that surround a backward are not seen by what it computes again): what
passes by is named `MODULE:q` and so on (`core/sites.py`). Only where the softmax itself is wanted
is attention computed step by step, with its whole matrix in memory.
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

from ..core.attentions import PART
from ..core.errors import QSearchError
from ..core.sites import cut

Through = Callable[[Tensor], Tensor]
#: (what attention made, its queries, keys and values, their scale) -> what goes on
WholeThrough = Callable[[Tensor, tuple[Tensor, Tensor, Tensor], float | None], Tensor]
#: of torch's scaled_dot_product_attention, in its order
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@contextmanager
def passing(model: nn.Module, through: Mapping[str, Through | WholeThrough]) -> Iterator[None]:
    """Inside, the tensor at each site goes through its function; at `MODULE:attention` what
    attention made, with what it was made of.

    Raises `QSearchError` where a module ran and no attention was seen in it: a plan must not be
    carried out in silence by doing nothing; and at `MODULE:attention` for what is no self-attention
    of all tokens.
    """
    if not through:
        yield
        return
    wanted: dict[str, dict[str, Any]] = {}
    for site, function in through.items():
        module, part = cut(site)
        wanted.setdefault(module, {})[part] = function
    modules = dict(model.named_modules())
    held = {module: _Held(module, parts) for module, parts in wanted.items()}
    with ExitStack() as stack:
        for name, one in held.items():
            stack.callback(modules[name].register_forward_pre_hook(one.enter).remove)
            stack.callback(modules[name].register_forward_hook(one.leave, always_call=True).remove)
        yield
        if missed := [name for name, one in held.items() if one.ran and not one.seen]:
            raise QSearchError(
                "sites are seen where a module calls torch's "
                f"scaled_dot_product_attention; {missed[0]} computes attention in another "
                "way: leave its sites out"
            )


class _Held(TorchFunctionMode):
    """Sends the tensors of a module's attention through functions. `ran`: the module did; `seen`:
    its attention came by.
    """

    def __init__(self, module: str, through: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.through = module, through
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
        called = {**dict(zip(ARGUMENTS, args, strict=False)), **given}
        if PART in self.through:
            check_whole(self.module, **called)
        return _attention(self.through, **called)


def check_whole(
    module: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    """Refuse an attention that no sparse one stands for, by the name of its module.

    Raises:
        QSearchError: for a mask, dropout, grouped heads, or keys of other tokens than the queries.
    """
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
                f"dropout or grouped heads; {module} has {fault}: leave it dense"
            )


def _attention(
    through: Mapping[str, Any], query: Tensor, key: Tensor, value: Tensor, **settings: Any
) -> Tensor:
    query, key, value = (
        through[part](x) if part in through else x
        for part, x in (("q", query), ("k", key), ("v", value))
    )
    if "softmax" in through:
        made = step_by_step(query, key, value, weights=through["softmax"], **settings)
    else:
        made = F.scaled_dot_product_attention(query, key, value, **settings)
    if PART in through:
        made = through[PART](made, (query, key, value), settings.get("scale"))
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
    """`scaled_dot_product_attention` as its documentation defines it, the softmax [..., queries,
    keys] going through `weights`.
    """
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
