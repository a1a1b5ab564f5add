"""A packed model on disk: `model.safetensors`, the plan in its header; read tensor by tensor straight into packed layers.

The header says which graph the model has, the scheme of every layer and how skips are split, so that the packed layers can be laid out (without memory)
before a byte of them is read. A digest of the header and of every tensor stands in it too: a file that was cut, changed or put together from two is
refused before anything of the model is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.artifacts import Header, canonical, graph_name, write_atomic
from ..core.errors import ArtifactError, QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan, said
from ..core.scheme import Scheme
from ..core.steps import StepRanges
from ..measure.simulation import roots
from .attentions import attentions_in, follow_attentions, read, written
from .layers import QuantLayer
from .ranged import RangedLayer, choices_of, follow_steps, layers_in, steps_in
from .runtime import packed_layers, place_empty, warn_of_widened, warn_where_slower
from .skeletons import skeleton

__all__ = ["SCHEMA", "load", "save", "skeleton"]

SCHEMA = "qsearch.model/2"
_EARLIER = ("qsearch.model/1",)
_SECTION = "qsearch"


def save(model: nn.Module, path: Path, graph: OpGraph, plan: Plan | None = None) -> None:
    """Write `model`, packed by `apply`, atomically. `plan`: named in the header as what it was made from. Raises `QSearchError` for a model without packed layers."""
    from safetensors.torch import save_file

    layers = layers_in(model)
    if not layers:
        raise QSearchError(
            "a packed model holds packed layers; this one has none: give it to `apply` first"
        )
    tensors, same = _tensors(model)
    content = {
        "layers": said({name: choices_of(layer) for name, layer in layers.items()}),
        "steps": steps_in(model).content(),
        "splits": {
            name: list(one.splits)
            for name, layer in layers.items()
            if len((one := _first(layer)).parts) > 1
        },
        "axes": {name: axis for name, layer in layers.items() if (axis := _first(layer).axis)},
        "same": same,
        "header": asdict(
            Header(SCHEMA, graph=graph.id, parents={} if plan is None else {"plan": plan.id})
        ),
    }
    if (switch := attentions_in(model)) is not None:
        content["attentions"] = written(switch)
    whole = _Digest(content)
    for name in sorted(tensors):
        whole.add(name, tensors[name])
    metadata = {"format": "pt", _SECTION: canonical({**content, "digest": whole.text})}
    write_atomic(path, lambda temporary: save_file(tensors, str(temporary), metadata=metadata))


def load(path: Path, model: nn.Module, graph: OpGraph, device: str = "cpu") -> nn.Module:
    """Fill `model` (weights and all may be on the meta device, see `skeleton`) with the packed file; returns it, its layers replaced by packed ones.

    Raises `ArtifactError` for a file that is cut, changed, of another kind or another graph, or whose tensors are not those of this model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            content = _content(path, file.metadata() or {}, graph)
            names = sorted(file.keys())
            found: dict[str, Tensor] = {}
            whole = _Digest({k: v for k, v in content.items() if k != "digest"})
            for name in names:
                found[name] = file.get_tensor(name)
                whole.add(name, found[name])
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; make it with `qsearch apply`") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"{path} is not readable as safetensors, perhaps truncated ({error}); make it again with `qsearch apply`"
        ) from error
    if whole.text != content["digest"]:
        raise ArtifactError(
            f"{path} was changed: its tensors and its plan have digest {whole.text}, its header says {content['digest']}; make it again"
        )
    choices = {
        name: tuple(map(Scheme.parse, [text] if isinstance(text, str) else text))
        for name, text in content["layers"].items()
    }
    modules = dict(model.named_modules())
    for name in choices:
        if name not in modules:
            raise ArtifactError(
                f"{path} does not fit the model: it has no layer {name!r}{nearest(name, modules)}"
            )
    place_empty(model, choices, content["axes"], content["splits"])
    found |= {alias: found[name] for alias, name in content["same"].items()}
    _assign(path, model, found)
    model.to(device)  # tables that are part of a format
    warn_of_widened(packed_layers(model).items(), device, "preferred")
    warn_where_slower(model, graph, device)
    follow_steps(model, roots(model, graph), StepRanges.parse(content.get("steps")))
    if "attentions" in content:
        follow_attentions(model, roots(model, graph), graph, *read(content["attentions"]))
    return model


def _first(layer: QuantLayer | RangedLayer) -> QuantLayer:
    return layer.layers[0] if isinstance(layer, RangedLayer) else layer


def _content(path: Path, metadata: Mapping[str, str], graph: OpGraph) -> dict[str, Any]:
    try:
        content = json.loads(metadata[_SECTION])
        header, strings = (
            content["header"],
            [*content["same"].items(), ("digest", content["digest"])],
        )
        strings += [
            (name, text)
            for name, texts in content["layers"].items()
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        schema, made_for = header["schema"], header["graph"]
        sizes = [n for split in content["splits"].values() for n in split] + list(
            content["axes"].values()
        )
        if not all(isinstance(x, str) for pair in strings for x in pair) or not all(
            type(n) is int for n in sizes
        ):
            raise TypeError("a scheme that is no text, or a size that is no number")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} must be a {SCHEMA} file, its header is not ({type(error).__name__}: {error}); make it with `qsearch apply`"
        ) from None
    if schema != SCHEMA and schema not in _EARLIER:
        raise ArtifactError(
            f"{path} must be a {SCHEMA} file, its header says {schema!r}; make it again with this version"
        )
    known = (
        graph.id
    )  # first: it is what tells `graph_name` by which name earlier files call the graph
    if graph_name(made_for) != known:
        raise ArtifactError(
            f"{path} was made for graph {made_for}, the model here is graph {known}; make it again for this model"
        )
    return dict(content)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a state dict once, and other name -> name of those that are one and the same."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            same[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous().cpu()
    return tensors, same


def _assign(path: Path, model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Put each tensor in its place; names, shapes and types of packed tensors must be the model's."""
    wanted = model.state_dict(keep_vars=True)
    stored = {
        f"{layer}.{name}"
        for layer, module in packed_layers(model).items()
        for name, _ in module.named_buffers()
    }
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            where = "the file lacks" if name not in found else "the model has no place for"
            raise ArtifactError(
                f"{path} does not fit the model: {where} {name}{nearest(name, set(found) ^ set(wanted) - {name})}"
            )
        given, place = found[name], wanted[name]
        if given.shape != place.shape or (name in stored and given.dtype != place.dtype):
            raise ArtifactError(
                f"{path} does not fit the model: {name} is {_words(given)}, the model's is {_words(place)}"
            )
    for name, tensor in found.items():
        owner, _, attribute = name.rpartition(".")
        module, place = model.get_submodule(owner), wanted[name]
        setattr(
            module,
            attribute,
            nn.Parameter(tensor, requires_grad=False)
            if isinstance(place, nn.Parameter)
            else tensor,
        )
    left = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_meta
    ]
    if left:
        raise QSearchError(
            f"a model to be filled may leave out what its state dict holds; {left[0]} is on the meta device and no state dict has it"
        )


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class _Digest:
    """BLAKE2 over a header and tensors in the order of their names."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._state = hashlib.blake2b(canonical(content).encode(), digest_size=16)

    def add(self, name: str, tensor: Tensor) -> None:
        self._state.update(f"{name} {_words(tensor)}".encode())
        self._state.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )

    @property
    def text(self) -> str:
        return self._state.hexdigest()
