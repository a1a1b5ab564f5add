"""Cache of a quantized activation: Q, K and V read one tensor, which the first of them quantizes
for all three.

Rounding reads two bytes and writes one for each entry, which beside an int8 product with 1152
outputs is a third of its time. Whoever asks for the rows of the very tensor that was rounded last
gets those. Nothing is looked up by content, and no layer needs to know of another.

"The very tensor" is the object, at the same version: torch counts what is written to a tensor in
place. It doesn't count what a kernel writes past it, as the replay of a CUDA graph does. So a
reader that comes back gets fresh rows: in a loop the first layer rounds again, and the others read
what it rounded. There is no sharing where a count is missing (inference mode), while a CUDA graph
is being captured (its rows hold nothing until it is replayed, and another graph may be replayed
without it), and where a tensor is no plain one or something watches each operation (tracing), but
for `traced`, which is made for that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LAST = (
    threading.local()
)  # of each thread: the last tensor that was rounded, how, and its rows, which go when it goes
Ends = tuple[Tensor | None, ...]


def shared(
    x: Tensor, how: tuple[int, ...], ends: Ends, reader: int, make: Callable[[], Any]
) -> Any:
    """`make()`, or what it gave a moment ago to another `reader` of the same `x`, rounded in the
    same way `how` between the same `ends` of a grid.
    """
    plain = type(x) in (
        Tensor,
        torch.nn.Parameter,
    ) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    if (
        not plain
        or torch._C._len_torch_dispatch_stack()
        or any(t is not None and t.is_inference() for t in (x, *ends))
    ):
        return make()
    moment = None
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return make()
        moment = torch.cuda.current_stream(
            x.device
        )  # another stream would have to wait for this one
    return _kept("eager", x, (moment, how), ends, reader, make)


def traced(x: Tensor, how: tuple[int, ...], ends: Ends, make: Callable[[], Any]) -> Any:
    """The same while a graph is being written down: what is given back is in it already, so that
    the graph holds it once. Compilers of inference keep duplicates.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    writing = get_proxy_mode()
    return make() if writing is None else _kept("traced", x, (writing, how), ends, None, make)


def _kept(
    kind: str,
    x: Tensor,
    how: tuple[object, ...],
    ends: Ends,
    reader: int | None,
    make: Callable[[], Any],
) -> Any:
    state = (
        x._version,
        x.data_ptr() if reader is not None else 0,
        x.shape,
        x.stride(),
        how,
        tuple(None if end is None else end._version for end in ends),
    )
    last = getattr(_LAST, kind, None)
    if last is not None and last[0]() is x and last[1]:
        [kept_state, kept_ends, readers, rows] = last[1]
        if (
            kept_state == state
            and all(a is b for a, b in zip(kept_ends, ends, strict=True))
            and (reader is None or reader not in readers)
        ):
            readers.add(reader)
            return rows
    rows = make()
    kept = [state, ends, {reader}, rows]
    setattr(_LAST, kind, (weakref.ref(x, lambda _: kept.clear()), kept))
    return rows
