"""Reading a model with torch.export, non-strict, without weights and without arithmetic; the model
is left as it was.

Export runs the model's own Python on tensors without data and writes down every ATen operation with
the module that called it. `strict=False`, because strict mode interprets the bytecode, which is
slower and refuses more; and no decompositions, so that a linear layer stays one. What is exported
is a copy whose weights are one element each, seen as a whole tensor: as small as on the meta
device, but on the CPU, since `autocast` blocks, FlexAttention and tables made on the CPU refuse
"meta". Shared weights stay shared.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from .components import plain_class
from .operations import ATTENTIONS
from .trace import Call, Trace, bare, bound, flat, original, parameter_names, path_of

#: where accelerate and diffusers keep the hooks that move and cast weights; the module's own
#: forward lies beneath them
_HOOKS = ("_hf_hook", "_diffusers_hook")
_CALLED_AGAIN = re.compile(
    r"@\d+$"
)  # export's mark on the path of a module that runs more than once


def export(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """The trace of `model(**inputs)`. Raises what export raises where it refuses, such as control
    flow that depends on data.
    """
    twin = without_data(model)
    order = list(inspect.signature(twin.forward).parameters)
    names = sorted(inputs, key=lambda name: order.index(name) if name in order else len(order))
    given = pytree.tree_map_only(
        Tensor,
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype),
        {name: inputs[name] for name in names},
    )
    # Lazy: the Python code of half-made graphs is not written out.
    with (
        _quiet(),
        torch.no_grad(),
        whole_attention(),
        _no_autocast(),
        _no_collection(),
        _use_lazy_graph_module(True),
    ):
        program = torch.export.export(twin, (), given, strict=False)
    return _Reader(program, twin, given).trace()


@contextmanager
def whole_attention() -> Iterator[None]:
    """nn.MultiheadAttention without its fast path, which is one operation that hides the
    projections.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which walks over every node of the growing program again and
    again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _no_autocast() -> Iterator[None]:
    """`autocast` blocks do nothing: export makes a graph of each and inlines it again, which took
    half of Z-Image's time; numbers' types are no part of a graph.
    """
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = lambda self: self, lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without whole programs on the screen where export gives up (the model is read with hooks
    then), and without a stack trace for each node.
    """
    level, traces = (
        logging.root.manager.disable,
        getattr(fx.config, "do_not_emit_stack_traces", False),
    )
    logging.disable(logging.CRITICAL)
    fx.config.do_not_emit_stack_traces = True
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        fx.config.do_not_emit_stack_traces = traces
        logging.disable(level)


def without_data(model: nn.Module) -> nn.Module:
    """A copy in `eval()` mode whose tensors have no data: parameters, buffers, and what modules
    keep in plain attributes.

    Compiled modules are copied as what they were compiled from; hooks, such as those that move
    weights between devices, stay behind.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(_blank(parameter), requires_grad=False)
        hooks = [module.__dict__[name] for name in _HOOKS if name in module.__dict__]
        if hooks:  # they may hold what can't be copied, streams and threads
            memo.update({id(hook): None for hook in (*hooks, module.__dict__.get("forward"))})
        for value in (*module._buffers.values(), *module.__dict__.values()):
            for _, tensor in flat(value, ""):
                if isinstance(tensor, Tensor):
                    memo.setdefault(id(tensor), _blank(tensor))
    for module in reversed([m for m in model.modules() if original(m) is not m]):
        memo[id(module)] = copy.deepcopy(original(module), memo)
    twin = copy.deepcopy(original(model), memo)
    for module in twin.modules():
        module._compiled_call_impl = None
        module._forward_hooks.clear()
        _keep_weight_norms(module)
        if set(_HOOKS) & set(module.__dict__):
            module.__dict__.pop("forward", None)
        module.__class__ = plain_class(module)
    assert isinstance(twin, nn.Module)
    return twin.eval()


def _keep_weight_norms(module: nn.Module) -> None:
    """Clear hooks before the call but those of torch's older weight and spectral norms, which make
    the weight.
    """
    for key, hook in list(module._forward_pre_hooks.items()):
        if not isinstance(hook, WeightNorm | SpectralNorm):
            del module._forward_pre_hooks[key]


def _blank(tensor: Tensor) -> Tensor:
    return torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


class _Reader:
    """Walks an exported program, and the subprograms that its `no_grad` and `autocast` blocks
    become.
    """

    def __init__(
        self, program: torch.export.ExportedProgram, twin: nn.Module, given: dict[str, Any]
    ) -> None:
        self.program = program
        self.calls: list[Call] = []
        first, self.aliases = parameter_names(twin)
        # Export calls a shared parameter by any of its names; here it has the first that
        # named_parameters gives.
        self.parameters = {
            name: first[id(parameter)]
            for name, parameter in twin.named_parameters(remove_duplicate=False)
        }
        self.paths = iter([path_of(keys) for keys, _ in pytree.tree_flatten_with_path(given)[0]])

    def trace(self) -> Trace:
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder"]
        env: dict[fx.Node, Any] = {}
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            kind = spec.kind.name
            if kind == "USER_INPUT":
                path = next(self.paths)
                env[node] = (
                    self._add(Call("input", name=path), node)
                    if isinstance(node.meta.get("val"), Tensor)
                    else node.meta.get("val")
                )
            elif kind == "PARAMETER":
                env[node] = self._add(
                    Call("parameter", name=self.parameters[str(spec.target)]), node
                )
            else:
                env[node] = self._add(Call("constant", name=str(spec.target)), node)
        return Trace(
            self.calls, self._walk(self.program.graph_module, env, ""), "export", self.aliases
        )

    def _add(self, call: Call, node: fx.Node) -> Call:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            # A size that depends on data is no int: it raises here, and the model is read with
            # hooks instead.
            call.shape = tuple(int(size) for size in value.shape)
            call.integer = not (value.is_floating_point() or value.is_complex())
        self.calls.append(call)
        return call

    def _walk(
        self, module: fx.GraphModule, env: dict[fx.Node, Any], around: str
    ) -> tuple[Any, ...]:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                inner = getattr(module, str(node.target))
                env[node] = (
                    inner
                    if isinstance(inner, fx.GraphModule)
                    else self._add(Call("constant", name=str(node.target)), node)
                )
            elif node.op == "call_function":
                env[node] = self._call(node, env, around)
            elif node.op == "output":
                return tuple(pytree.tree_leaves(fx.map_arg(node.args[0], env.__getitem__)))
        return ()

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], around: str) -> Any:
        read: Any = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        args, kwargs = read
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        where = _CALLED_AGAIN.sub("", str(stack[-1][0])) if stack else around
        if isinstance(node.target, torch._ops.OpOverload):
            return self._add(
                Call(bare(node.target), bound(node.target, args, kwargs), where=where), node
            )
        name = getattr(node.target, "__name__", str(node.target))
        if (
            name in ATTENTIONS
        ):  # FlexAttention, whose score function is no part of the model's data flow
            return self._add(
                Call(name, {"query": args[0], "key": args[1], "value": args[2]}, where=where), node
            )
        if name == "getitem" and isinstance(args[0], list):
            return args[0][args[1]]
        inner = next((i for i, a in enumerate(args) if isinstance(a, fx.GraphModule)), None)
        if inner is not None:
            within = [n for n in args[inner].graph.nodes if n.op == "placeholder"]
            return list(
                self._walk(args[inner], dict(zip(within, args[inner + 1 :], strict=True)), where)
            )
        return self._add(
            Call(name, {str(i): a for i, a in enumerate(args)} | kwargs, where=where), node
        )
