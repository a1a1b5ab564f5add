"""extract(model, example_inputs) -> OpGraph: any denoiser as layers, operations, edges and blocks,
with no code per model.

The model is exported without its data (`exporting`); where export refuses, one call is watched with
hooks (`tracing`). Both give a trace, which is folded into steps that compute; inputs are
classified, reachability and wiring are read off the data flow, and from them the class of each
layer, its role and the blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.errors import QSearchError
from ..core.graph import Block, LayerSpec, Op, OpGraph
from . import blocks, folding, patterns, reachability, roles
from . import operations as ops
from .components import Components, entered, flat_arguments, merged, text_inputs
from .exporting import export
from .folding import Step
from .trace import Trace, named_modules, original
from .tracing import trace
from .wiring import Wiring


def extract(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    *,
    name: str = "",
    inputs: Mapping[str, str] | None = None,
) -> OpGraph:
    """Graph of `model` as called with the keyword arguments `example_inputs`.

    Args:
        model: the denoiser, or `Components` of a pipeline.
        example_inputs: keyword -> value; of several components, component -> its keyword arguments,
            of a VAE `{"args": ..., "kwargs": ...}` of its `decode`. Their values count only where
            the model's control flow depends on them: then `source` is "hooks", else "export".
        name: the model's name for people.
        inputs: what an input is where its name does not tell: name -> image, step, text, pooled or
            structure (positions, masks).

    Returns:
        Layers, operations and blocks, with shapes, roles and costs of this call.

    Raises:
        QSearchError: the call fails or an input can't be classified, with the signature of the
            model's forward.
    """
    if isinstance(model, Components):
        return _of_parts(model, example_inputs, name, inputs)
    whole = original(model)
    signature = str(inspect.signature(whole.forward))
    read = _read(model, example_inputs, signature)
    given = {call.name: call for call in read.calls if call.op == "input"}
    classes = reachability.classify(given, inputs or {}, signature)
    steps = patterns.recognise(
        folding.fold(read, frozenset(n for n, c in classes.items() if c == "structure"))
    )
    wiring = Wiring(steps, reachability.sees(steps, classes), reachability.tokens(read, classes))
    return _Builder(whole, read, wiring).graph(name or type(whole).__name__)


def _of_parts(
    model: Components,
    example_inputs: Mapping[str, Any],
    name: str,
    inputs: Mapping[str, str] | None,
) -> OpGraph:
    missing = [part for part in model.parts if part not in example_inputs]
    if missing:
        raise QSearchError(
            f"a graph of {', '.join(model.parts)} needs an example call of each; there is none of "
            f"{', '.join(missing)}: give {{component: inputs}}, as `example_inputs` makes "
            "it of a recorded call"
        )
    graphs: dict[str, OpGraph] = {}
    for part, module in model.parts.items():
        given = example_inputs[part]
        if model.entry(part) != "forward":
            with entered(module, model.entry(part)):
                graphs[part] = extract(module, flat_arguments(given), inputs={"latents": "image"})
        else:
            graphs[part] = extract(module, given, inputs=inputs or text_inputs(module, given))
    graph = merged(graphs, model.spans)
    return replace(graph, model=name) if name else graph


def _read(model: nn.Module, example_inputs: Mapping[str, Any], signature: str) -> Trace:
    whole = original(model)
    given = dict(example_inputs)
    if "return_dict" in inspect.signature(whole.forward).parameters:
        given.setdefault("return_dict", False)  # a tuple needs no registration with pytree
    try:
        return export(model, given)
    except Exception as error:
        refused = (
            f"{type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
    return trace(model, given, signature, refused)


class _Builder:
    """Steps, roles and blocks as the nouns of `core.graph`."""

    def __init__(self, model: nn.Module, read: Trace, wiring: Wiring) -> None:
        self.model = model
        self.modules, self.read, self.wiring = named_modules(model), read, wiring
        self.lists = _repeated(self.modules)
        self.roles = roles.assign(wiring)
        self.by_layer: dict[str, list[Step]] = {}
        for step in wiring.steps:
            if step.weight is not None:
                self.by_layer.setdefault(step.layer, []).append(step)
        self.names = self._layer_names()
        self.ops = self._op_names()

    def graph(self, name: str) -> OpGraph:
        layers = [self._layer(parameter, steps) for parameter, steps in self.by_layer.items()]
        layers += self._unused()
        if not layers:
            raise QSearchError(f"a model needs at least one layer with a weight; {name} has none")
        steps = self.wiring.steps
        edges = dict.fromkeys(
            (self.ops[made], self.ops[step]) for step in steps for made in step.inputs
        )
        return OpGraph(
            name,
            tuple(layers),
            tuple(map(self._op, steps)),
            tuple(edges),
            self._blocks(),
            self.read.source,
        )

    def _layer_names(self) -> dict[str, str]:
        """Parameter -> layer: the module's name; the parameter's own where it is not the module's
        only or main weight.
        """
        held: dict[str, list[str]] = {}
        for parameter in self.by_layer:
            held.setdefault(_owner(parameter)[0], []).append(parameter)
        return {
            p: module if module and (len(ps) == 1 or p == f"{module}.weight") else p
            for module, ps in held.items()
            for p in ps
        }

    def _op_names(self) -> dict[Step, str]:
        taken: dict[str, int] = {}
        out = {}
        for step in self.wiring.steps:
            if step.weight is not None:
                name = self.names[step.layer]
            elif step.kind in ("input", "output"):
                name = f"{step.kind}:{step.call.name}"
            else:
                name = ".".join(filter(None, (step.call.where, step.kind)))
            taken[name] = taken.get(name, 0) + 1
            out[step] = name if taken[name] == 1 else f"{name}#{taken[name]}"
        return out

    def _op(self, step: Step) -> Op:
        layer = self.names[step.layer] if step.weight is not None else ""
        return Op(
            name=self.ops[step],
            kind=step.kind,
            layer=layer,
            block=self._home(layer) if layer else self._home(f"{step.call.where}."),
            shape=step.call.shape,
            macs=step.macs,
            inputs=sum(read.numel for read in step.reads),
            outputs=0 if step.kind == "output" else step.call.numel,
        )

    def _layer(self, parameter: str, steps: list[Step]) -> LayerSpec:
        first = steps[0]
        assert first.weight is not None
        name, (module, attribute) = self.names[parameter], _owner(parameter)
        kind = first.kind
        aliases = tuple(_owner(alias)[0] for alias in self.read.aliases.get(parameter, ()))
        reach = frozenset().union(*(self.wiring.given_sees(step) for step in steps))
        return LayerSpec(
            name=name,
            role=_role([self.roles[step] for step in steps]),
            kind=kind,
            weight_shape=first.weight.shape,
            macs=sum(step.macs for step in steps),
            block=self._home(name),
            channel_axis=1 if kind.startswith("conv-") or first.transposed else 0,
            calls=len(steps),
            inputs=sum(step.reads[0].numel for step in steps if step.reads),
            outputs=sum(step.call.numel for step in steps),
            bias=isinstance(getattr(self.modules[module], "bias", None), nn.Parameter),
            quantizable=kind != "embedding" and attribute == "weight" and first.weight.numel > 0,
            sees=reachability.word(reach),
            splits=_splits(first) if "image" in reach else (),
            aliases=aliases,
            shared=tuple(a for a in aliases if self.same(a, module)),
            parameter=attribute,
        )

    def same(self, alias: str, module: str) -> bool:
        """Whether two names are those of one module."""
        return self.model.get_submodule(alias) is self.modules[module]

    def _unused(self) -> list[LayerSpec]:
        """Layers that this call did not run: in the file, but without a role to play."""
        known = {
            *self.by_layer,
            *(alias for others in self.read.aliases.values() for alias in others),
        }
        out = []
        for name, module in self.modules.items():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim >= 2 and f"{name}.weight" not in known:
                shape = tuple(weight.shape)
                out.append(
                    LayerSpec(
                        name,
                        roles.UNUSED,
                        _declared(module),
                        shape,
                        0,
                        self._home(name),
                        calls=0,
                        quantizable=False,
                    )
                )
        return out

    def _home(self, path: str) -> str:
        """The repeated module that a path lies in; "a.b." is a place in a.b."""
        parts = path.split(".")[:-1]
        return next(
            (held for i in range(len(parts), 0, -1) if (held := ".".join(parts[:i])) in self.lists),
            "",
        )

    def _blocks(self) -> tuple[Block, ...]:
        groups = blocks.group(self.wiring, self.roles)
        depth = blocks.depths(groups, self.wiring)
        taken: dict[str, int] = {}
        out = []
        for position, block in enumerate(groups):
            layers = tuple(dict.fromkeys(self.names[step.layer] for step in block.layers))
            own = [
                self.names[step.layer] for step in block.layers if self.roles[step] != "modulation"
            ]
            path = (
                blocks.shared_path(own or list(layers) or [step.call.where for step in block.steps])
                or block.kind
            )
            taken[path] = taken.get(path, 0) + 1
            name = path if taken[path] == 1 else f"{path}#{taken[path]}"
            out.append(
                Block(
                    name,
                    block.kind,
                    layers,
                    position,
                    depth[block],
                    tuple(self.ops[step] for step in block.steps),
                )
            )
        return tuple(out)


def _role(found: list[str]) -> str:
    """Role of a layer for those of its calls: the first, or `…-qkv` where parts of one weight make
    query, key and value.
    """
    heads = {role.rpartition("-")[0] for role in found}
    letters = {role.rpartition("-")[2] for role in found}
    if len(heads) == 1 and "attention" in found[0] and set("".join(letters)) <= set("qkv"):
        slots = "".join(slot for slot in "qkv" if any(slot in part for part in letters))
        return f"{heads.pop()}-{slots}"
    return found[0]


def _owner(parameter: str) -> tuple[str, str]:
    """Module and attribute of a parameter; one that torch computes another from belongs to the
    module that uses that.
    """
    module, _, rest = parameter.partition(".parametrizations.")
    if rest:
        return module, f"parametrizations.{rest}"
    module, _, attribute = parameter.rpartition(".")
    return module, attribute


def _repeated(modules: dict[str, nn.Module]) -> frozenset[str]:
    """Members of module lists that hold at least two layers: the repeated blocks."""
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    members = {
        f"{name}.{i}" if name else i for name in lists for i, _ in modules[name].named_children()
    }
    held = {
        m: sum(p.ndim >= 2 and n.endswith("weight") for n, p in modules[m].named_parameters())
        for m in members
        if m in modules
    }
    return frozenset(m for m, count in held.items() if count >= 2)


def _declared(module: nn.Module) -> str:
    weight = module._parameters["weight"]
    assert weight is not None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if weight.ndim == 2:
        return "linear"
    return f"conv{'-transpose' if getattr(module, 'transposed', False) else ''}{weight.ndim - 2}d"


def _splits(step: Step) -> tuple[int, ...]:
    """Channels of each part where a layer reads a concatenation along its input channels, through
    norms and activations.
    """
    if not step.inputs:
        return ()
    at = step.inputs[0]
    while at.kind in ("norm", "activation", "modulation"):
        at = at.inputs[0]
    axis = ops.axis_of(at.call)
    if at.kind != "concat" or len(at.reads) < 2 or at.call.shape[axis : axis + 1] != (step.width,):
        return ()
    return tuple(read.shape[axis] for read in at.call.given)
