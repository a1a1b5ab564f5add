"""Reading a model by watching one real call: the fallback where export refuses, because control
flow depends on data.

A dispatch mode sees every ATen operation that the call makes, forward hooks say which module made
it. The model runs as it is, on its own device and with its own values, so it needs weights, and as
much time and memory as a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..core.errors import QSearchError
from .exporting import whole_attention
from .trace import Call, Trace, bare, bound, named_modules, original, parameter_names, path_of


def trace(model: nn.Module, inputs: Mapping[str, Any], signature: str, refused: str) -> Trace:
    """The trace of `model(**inputs)`. Raises `QSearchError` with the signature when the call fails;
    `refused`: why export did.
    """
    whole = original(model)
    watch = _Watch(whole)
    for keys, leaf in pytree.tree_flatten_with_path(dict(inputs))[0]:
        if isinstance(leaf, Tensor):
            watch.give(leaf, Call("input", name=path_of(keys)))
    training = {module: module.training for module in whole.modules()}
    try:
        with ExitStack() as stack:
            for name, module in named_modules(whole).items():
                stack.callback(module.register_forward_pre_hook(watch.entering(name)).remove)
                stack.callback(module.register_forward_hook(watch.leaving, always_call=True).remove)
            whole.eval()
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            stack.enter_context(whole_attention())
            stack.enter_context(watch)
            output = whole(**inputs)
    except Exception as error:
        meta = any(parameter.is_meta for parameter in whole.parameters())
        hint = (
            (
                ", or, since what it does depends on data, give it weights (of any value) "
                "instead of the meta device"
            )
            if meta
            else ""
        )
        raise QSearchError(
            f"{type(whole).__name__} can't be called with these example inputs "
            f"({type(error).__name__}: {error}); its forward takes {signature}; "
            f"pass each argument by its name in example_inputs{hint}. torch.export had "
            f"refused with {refused}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    outputs = leaves or [v for v in vars(output).values() if isinstance(v, Tensor)]
    return Trace(
        watch.calls, tuple(watch.call_of(leaf) for leaf in outputs), "hooks", watch.aliases
    )


class _Watch(TorchDispatchMode):
    """Writes down operations as they are dispatched. Tensors are known by identity while they
    live.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.stack: list[str] = [""]
        self.known = WeakIdKeyDictionary()
        first, self.aliases = parameter_names(model)
        for parameter in model.parameters():
            self.give(parameter, Call("parameter", name=first[id(parameter)]))

    def give(self, tensor: Tensor, call: Call) -> Call:
        call.shape = tuple(tensor.shape)
        call.integer = not (tensor.is_floating_point() or tensor.is_complex())
        self.calls.append(call)
        self.known[tensor] = call
        return call

    def call_of(self, tensor: Tensor) -> Call:
        found = self.known.get(tensor)
        return found if isinstance(found, Call) else self.give(tensor, Call("constant"))

    def entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.stack.append(name)

        return hook

    def leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        read, named = pytree.tree_map_only(Tensor, self.call_of, (tuple(args), kwargs or {}))
        if isinstance(func, torch._ops.OpOverload):
            call = Call(bare(func), bound(func, read, named), where=self.stack[-1])
        else:  # FlexAttention: query, key and value come first
            call = Call(
                func.name(), {str(i): a for i, a in enumerate(read[:3])}, where=self.stack[-1]
            )
        if isinstance(made, Tensor) and not (args and made is args[0]):
            self.give(made, call)
        elif isinstance(made, Tensor):
            call.shape = tuple(made.shape)
            self.calls.append(
                call
                # in place: the tensor keeps its own call, the writing is followed when steps are
                # folded
            )
        else:
            self.calls.append(call)
            for i, part in enumerate(made if isinstance(made, tuple | list) else ()):
                if isinstance(part, Tensor):
                    self.give(part, Call("getitem", {"0": call, "1": i}, where=self.stack[-1]))
        return made
