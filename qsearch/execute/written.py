"""The weight of a packed layer as code from elsewhere sees it: a tensor whose `data` may be
replaced.

Adapters are fused by adding to `layer.weight.data` (peft, diffusers' `fuse_lora`). A packed layer
makes its weight when it is asked, so that what is written into that tensor would be lost without a
word: replacing `data` stores the new weight in the layer's own format, all else that writes is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import QSearchError

_WRITERS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class PackedView(torch.Tensor):
    """A dequantized weight that knows how to be stored again."""

    store: Callable[[Tensor], None]

    @staticmethod
    def of(values: Tensor, store: Callable[[Tensor], None]) -> PackedView:
        """`values`, whose replaced `data` goes to `store`."""
        view = values.detach().as_subclass(PackedView)
        view.store = store
        return view

    @property
    def data(self) -> Tensor:
        """The values as a plain tensor; assigning stores them."""
        return self.as_subclass(torch.Tensor).detach().clone()

    @data.setter
    def data(self, values: Tensor) -> None:
        self.store(values)

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch makes of it, as plain tensors. Raises `QSearchError` for what writes."""
        name = getattr(func, "__name__", "")
        writes = name in _WRITERS or (name.endswith("_") and not name.endswith("__"))
        if writes and args and isinstance(args[0], PackedView) and name != "requires_grad_":
            raise QSearchError(
                f"a packed weight is made when it is asked for, and {name} would write into a "
                "copy: assign `weight.data = values`, which stores them in the layer's format"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
