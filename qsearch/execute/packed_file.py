"""A packed model on disk: `model.safetensors`, the plan in its header; read tensor by tensor
straight into packed layers.

The header says which graph the model has, the scheme of every layer and how skips are split, so
that the packed layers can be laid out (without memory) before a byte of them is read. A digest of
the header and of every tensor stands in it too: a file that was cut, changed or put together from
two is refused before anything of the model is touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.artifacts import Header, canonical, graph_name, write_atomic, writing
from ..core.errors import ArtifactError, QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan, said
from ..core.scheme import KEEP, Scheme
from ..core.steps import StepRanges
from ..measure.quantized_weights import QuantizedWeights
from ..measure.simulation import roots
from ..measure.skeletons import skeleton
from ..measure.streaming import present
from .attentions import attentions_in, follow_attentions, read, written
from .layers import QuantLayer
from .ranged import RangedLayer, choices_of, follow_steps, layers_in, steps_in
from .runtime import packed_layer, packed_layers, place_empty, warn_of_widened, warn_where_slower
from .weights import Parts

__all__ = ["SCHEMA", "load", "save", "skeleton"]

SCHEMA = "qsearch.model/2"
_EARLIER = ("qsearch.model/1",)
_SECTION = "qsearch"


def save(model: nn.Module, path: Path, graph: OpGraph, plan: Plan | None = None) -> None:
    """Write `model`, packed by `apply`, atomically. `plan`: named in the header as what it was made
    from. Raises `QSearchError` for a model without packed layers.
    """
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
    _write(path, ({name: tensor} for name, tensor in tensors.items()), content)


@torch.no_grad()
def pack(
    model: nn.Module,
    path: Path,
    graph: OpGraph,
    plan: Plan,
    weights: QuantizedWeights | None = None,
) -> int:
    """`apply` and `save` of a streamed model, a layer at a time: it stays as it is, and neither it
    nor what is packed is ever in memory.

    Args:
        model: as `load_pipeline` opens it with offload.
        path: the file.
        graph: the model's graph.
        plan: one choice for each layer, for all sampler steps.
        weights: with the calibration that some schemes ask for.

    Returns:
        How many layers were packed.

    Raises:
        QSearchError: a plan over ranges of steps, or of attention, or a weight of several layers:
            these are packed in memory.
    """
    weights = weights or QuantizedWeights(model, graph)
    chosen = {name: held for name, held in plan.weights.items() if held != (KEEP,)}
    rest = "pack it with offload none, in memory"
    if len(plan.steps) > 1 or any(held != (KEEP,) for held in plan.sites.values()):
        raise QSearchError(
            f"a streamed model is packed for all steps, and without attention's choices: {rest}"
        )
    specs = {name: graph.layer(name) for name in chosen}
    for name, spec in specs.items():
        if spec.aliases:
            raise QSearchError(f"{name} and {spec.aliases[0]} share one weight: {rest}")
    content = {
        "layers": said(chosen),
        "steps": plan.steps.content(),
        "splits": {name: list(spec.parts) for name, spec in specs.items() if spec.parts},
        "axes": {name: spec.channel_axis for name, spec in specs.items() if spec.channel_axis},
        "same": {},
        "header": asdict(Header(SCHEMA, graph=graph.id, parents={"plan": plan.id})),
    }

    def groups() -> Iterator[dict[str, Tensor]]:
        for name, choices in chosen.items():
            layer = packed_layer(model, graph, weights, name, choices)
            yield {f"{name}.{own}": tensor for own, tensor in layer.state_dict().items()}
            weights.forget(name)
        for owner, module in model.named_modules():
            if owner in chosen:
                continue
            with present(module, deep=False):
                held = module.state_dict(prefix=f"{owner}." if owner else "")
                own = [*module._parameters, *module._buffers]
                names = {f"{owner}.{n}" if owner else n for n in own}
                yield {name: tensor for name, tensor in held.items() if name in names}

    _write(path, groups(), content)
    return len(chosen)


def _write(path: Path, groups: Iterable[Mapping[str, Tensor]], content: dict[str, Any]) -> None:
    """The file, atomically, its tensors a group at a time; their digest is taken when all are
    there.
    """
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        parts = Parts(Path(f"{path}.parts"))
    try:
        whole = _Digest(content)
        with writing(path):
            for group in groups:
                parts.add(group)
            for name in sorted(parts.held):
                kind, shape, *_ = parts.held[name]
                whole.add_pieces(name, f"{kind} {tuple(shape)}", parts.bytes_of(name))
        metadata = {_SECTION: canonical({**content, "digest": whole.text})}
        write_atomic(path, lambda temporary: parts.finish(temporary, metadata))
    finally:
        parts.close()


def load(path: Path, model: nn.Module, graph: OpGraph, device: str = "cpu") -> nn.Module:
    """Fill `model` (weights and all may be on the meta device, see `skeleton`) with the packed
    file; returns it, its layers replaced by packed ones.

    Raises `ArtifactError` for a file that is cut, changed, of another kind or another graph, or
    whose tensors are not those of this model.
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
            f"{path} is not readable as safetensors, perhaps truncated ({error}); make it "
            "again with `qsearch apply`"
        ) from error
    if whole.text != content["digest"]:
        raise ArtifactError(
            f"{path} was changed: its tensors and its plan have digest {whole.text}, its "
            f"header says {content['digest']}; make it again"
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
            f"{path} must be a {SCHEMA} file, its header is not ({type(error).__name__}: "
            f"{error}); make it with `qsearch apply`"
        ) from None
    if schema != SCHEMA and schema not in _EARLIER:
        raise ArtifactError(
            f"{path} must be a {SCHEMA} file, its header says {schema!r}; make it again "
            "with this version"
        )
    known = (
        graph.id
    )  # first: it is what tells `graph_name` by which name earlier files call the graph
    if graph_name(made_for) != known:
        raise ArtifactError(
            f"{path} was made for graph {made_for}, the model here is graph {known}; make "
            "it again for this model"
        )
    return dict(content)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a state dict once, and other name -> name of those that are one and the
    same.
    """
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
    """Put each tensor in its place; names, shapes and types of packed tensors must be the
    model's.
    """
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
                f"{path} does not fit the model: {where} "
                f"{name}{nearest(name, set(found) ^ set(wanted) - {name})}"
            )
        given, place = found[name], wanted[name]
        if given.shape != place.shape or (name in stored and given.dtype != place.dtype):
            raise ArtifactError(
                f"{path} does not fit the model: {name} is {_words(given)}, the model's "
                f"is {_words(place)}"
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
            f"a model to be filled may leave out what its state dict holds; {left[0]} is "
            "on the meta device and no state dict has it"
        )


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


class _Digest:
    """BLAKE2 over a header and tensors in the order of their names."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._state = hashlib.blake2b(canonical(content).encode(), digest_size=16)

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor."""
        held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self.add_pieces(name, _words(tensor), [held.numpy().data])

    def add_pieces(self, name: str, words: str, pieces: Iterable[Any]) -> None:
        """A tensor's name, its type and shape, and its bytes in pieces."""
        self._state.update(f"{name} {words}".encode())
        for piece in pieces:
            self._state.update(piece)

    @property
    def text(self) -> str:
        return self._state.hexdigest()
