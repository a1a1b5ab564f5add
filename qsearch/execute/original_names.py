"""Names of a model's original checkpoint, and which of our tensors it holds as one: for tools that
read these.

Flux, PixArt and Z-Image fuse queries, keys and values (Flux's single blocks the first layer of the
feed-forward too), Wan and Stable Diffusion's U-Nets rename (`original_tables`). They do where a
tool knows the model: where it reads the text encoder of the published ones. Others keep diffusers'
names, and so does Qwen-Image, whose original ones are these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..measure.shards import Weights, key
from .exporting import Export
from .original_tables import SWAPPED, TABLES, TEXT, Table, unet

if TYPE_CHECKING:
    from torch import Tensor

#: classes whose original names are known
LAYOUTS = tuple(TEXT)


@dataclass(frozen=True)
class Original:
    """A tensor of the original checkpoint: the rows of ours, one under another.

    Attributes:
        parts: our names.
        swapped: whether its halves stand the other way round.
    """

    parts: tuple[str, ...]
    swapped: bool = False

    def of(self, weights: Weights) -> Tensor:
        """The tensor, from ours."""
        import torch

        held = [weights.tensor(name) for name in self.parts]
        whole = held[0] if len(held) == 1 else torch.cat(held)
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole


def layout_of(config: Mapping[str, Any]) -> str:
    """The class whose original names a model has, by its config.json; "" for a model that keeps
    diffusers' names.
    """
    name = str(config.get("_class_name"))
    width, published = TEXT.get(name, ("", ()))
    return name if config.get(width) in published else ""


def computed(layout: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Buffers of the original that diffusers' files do not hold, since they follow from the
    configuration: PixArt's positions [1, positions, channels], whose number says the resolution.
    """
    if layout != "PixArtTransformer2DModel":
        return {}
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    size, side = config["sample_size"], config["sample_size"] // config["patch_size"]
    positions = get_2d_sincos_pos_embed(
        config["num_attention_heads"] * config["attention_head_dim"],
        side,
        base_size=side,
        interpolation_scale=config.get("interpolation_scale") or max(size // 64, 1),
        output_type="pt",
    )
    return {"pos_embed": positions[None].float()}


def originals(layout: str, names: Iterable[str]) -> dict[str, Original]:
    """Original name -> what it stands for.

    Args:
        layout: of `layout_of`.
        names: tensors of a component, as diffusers names them.

    Raises:
        QSearchError: a tensor has no original name.
    """
    known = list(names)
    if not layout:
        return {name: Original((name,)) for name in known}
    table = _compiled(unet(known) if layout == "UNet2DConditionModel" else TABLES[layout])
    held: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in known:
        place = _place(name, table)
        if place is None:
            raise QSearchError(
                f"no original name of {name} is known ({layout}); export to diffusers' own formats"
            )
        held[place[1]].append((place[0], name))
    turned = SWAPPED.get(layout, " ")
    return {
        theirs: Original(tuple(name for _, name in sorted(parts)), theirs.startswith(turned))
        for theirs, parts in held.items()
    }


def _compiled(table: Table) -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.escape(own).replace(r"\{n\}", r"(\d+)") + r"(?=\.|$)"), theirs)
        for own, theirs in table
    ]


def _place(name: str, table: list[tuple[re.Pattern[str], str]]) -> tuple[int, str] | None:
    """(row of the table, original name)."""
    for row, (own, theirs) in enumerate(table):
        if found := own.match(name):
            number = found[1] if found.groups() else ""
            return row, theirs.replace("{n}", number) + name[found.end() :]
    return None


def tied(graph: OpGraph) -> list[tuple[str, ...]]:
    """Layers that an original checkpoint holds as one: of each component those whose names all
    have a place in one layout.
    """
    parts: dict[str, list[LayerSpec]] = defaultdict(list)
    for layer in graph.quantizable:
        parts[f"{graph.component(layer.name)}." if graph.components else ""].append(layer)
    return [
        names
        for start, layers in parts.items()
        for table in TABLES.values()
        for names in _joined(start, layers, _compiled(table))
    ]


def _joined(
    start: str, layers: Iterable[LayerSpec], table: list[tuple[re.Pattern[str], str]]
) -> list[tuple[str, ...]]:
    """Layers of one original weight; none where the table lacks one of the layers."""
    held: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        place = _place(layer.name.removeprefix(start), table)
        if place is None:
            return []
        if layer.kind == "linear":
            held[place[1]].append(layer.name)
    return [tuple(names) for names in held.values() if len(names) > 1]


def stacked(job: Export, names: Mapping[str, Original]) -> Export:
    """The job under original names: a layer for each weight of the original checkpoint.

    Args:
        job: a job under our names.
        names: of `originals`.

    Raises:
        QSearchError: layers that are one in the original have different schemes.
    """
    layers = whole(job.graph, names)
    choices, seen = dict[str, Scheme](), {}
    for layer, parts in layers:
        schemes = {job.plan.layers[part.name]: part.name for part in parts}
        if len(schemes) > 1:
            said = ", ".join(f"{name} {scheme}" for scheme, name in schemes.items())
            raise QSearchError(
                f"the original checkpoint has one weight {layer.name} for layers whose schemes "
                f"differ: {said}; allocate with --for comfyui"
            )
        [choices[layer.name]] = schemes
        held = job.calibration.get(parts[0].name)
        if held is not None:
            seen[layer.name] = held
    graph = OpGraph(job.graph.model, tuple(layer for layer, _ in layers))
    plan = Plan.make(graph, choices, solver=job.plan.solver)
    return replace(job, graph=graph, plan=plan, calibration=seen)


def whole(graph: OpGraph, names: Mapping[str, Original]) -> list[tuple[LayerSpec, list[LayerSpec]]]:
    """(a layer of the original checkpoint, ours that are its rows), for every layer of ours."""
    known = {key(layer): layer for layer in graph}
    made = []
    for theirs, original in names.items():
        parts = [known[name] for name in original.parts if name in known]
        if parts:
            shape = parts[0].weight_shape
            if len(parts) > 1:
                shape = (sum(part.weight_shape[0] for part in parts), *shape[1:])
            name = theirs.removesuffix(f".{parts[0].parameter}")
            made.append((replace(parts[0], name=name, weight_shape=shape), parts))
    return made
