"""cache-dit's `precision_plan`: a type for every quantized layer, and the list of the layers that
get none, as its `load_quantize_config` reads them.

cache-dit quantizes while it loads, by torchao, and chooses codes itself. It goes through the types
in an order of its own; a layer gets the first type one of whose entries is a part of the layer's
name, unless an entry of the list of the others is, and what is left gets the default type. A plan
that this would change is refused. Names are counted from the model down, which is why the region
that is quantized (`repeated_blocks`) is the whole model: within blocks, cache-dit sees the same
names in each. diffusers' classes have regions of their own, and cache-dit takes these first: set
the model's `_repeated_blocks` to the file's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of

needs: tuple[str, ...] = ()
writes_weights = False
fuses = False
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
FILE = "cache_dit.yaml"
#: scheme -> its type there, in the order in which cache-dit goes through them
TYPES = {
    "e4m3-c+ae4m3": "float8_per_row",
    "e4m3-c": "float8_weight_only",
    "nvfp4+anvfp4": "nvfp4",
    "nvfp4": "nvfp4_weight_only",
    "int8-c+aint8": "int8_per_row",
    "int8-c": "int8_weight_only",
    "uint4-g32": "int4_weight_only",
}
#: what a layer gets that neither list names: none of the plan's
_DEFAULT = "int8_weight_only"
_BLOCK, _GROUP = 16, 32
#: rows that a weight must have more than, and sides of which one must be larger, for NVFP4 products
_ROWS, _SIDE = 64, 1024


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers: e4m3 and int8 a channel and nvfp4, with inputs as they are or rounded, and
    uint4 in groups of 32; codes are the tool's own.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    rows, channels = layer.weight_shape
    blocks = rows % _BLOCK == 0 == channels % _BLOCK
    able = {
        "nvfp4": blocks,
        "nvfp4+anvfp4": blocks and rows > _ROWS and max(rows, channels) > _SIDE,
        "uint4-g32": divides(_GROUP, layer),
    }
    offers = [Scheme.parse(text) for text in TYPES if able.get(text, True)]
    return replace(nearest_of(scheme, layer, offers), method="")


def write(job: Export, folder: Path) -> list[Path]:
    """cache_dit.yaml: the arguments of its `QuantizeConfig`.

    Raises:
        QSearchError: its matching of names would give a layer something else than the plan does.
    """
    import yaml

    linear = [layer.name for layer in job.graph if layer.kind == "linear"]
    plan = {
        name: TYPES[str(scheme)]
        for name in linear
        if (scheme := replace(job.plan.layers[name], method="")) != KEEP
    }
    others = (n.removesuffix(".weight") for n in job.weights.files if n.endswith(".weight"))
    kept = [n for n in dict.fromkeys((*linear, *others)) if n not in plan]
    for name in linear:
        given = _type(name, plan, kept)
        if given != plan.get(name):
            raise QSearchError(
                f"cache-dit finds layers by parts of their names, and would give {name} "
                f"{given or 'no type'} instead of {plan.get(name, 'none')}, since another layer's "
                "name is a part of this one: give both one scheme"
            )
    config = {
        "quant_type": _DEFAULT,
        "regional_quantize": True,
        "repeated_blocks": [str(job.weights.config.get("_class_name", ""))],
        "precision_plan": plan,
        "exclude_layers": kept,
    }
    path = folder / FILE
    path.write_text(yaml.safe_dump({"quantize_config": config}, sort_keys=False), encoding="utf-8")
    return [path]


def _type(name: str, plan: Mapping[str, str], kept: Iterable[str]) -> str | None:
    """The type that cache-dit gives a linear layer; None for none."""
    if any(entry in name for entry in kept):
        return None
    given = {kind for entry, kind in plan.items() if entry in name}
    return next((kind for kind in TYPES.values() if kind in given), _DEFAULT)


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """What cache-dit makes of the file's two lists, layer by layer."""
    import yaml

    path = folder / FILE
    try:
        said: Any = yaml.safe_load(path.read_text(encoding="utf-8"))["quantize_config"]
        plan = {str(name): str(kind) for name, kind in said["precision_plan"].items()}
        kept = [str(name) for name in said["exclude_layers"]]
        whole = said["regional_quantize"] is True and len(said["repeated_blocks"]) == 1
        default = said["quant_type"]
    except (OSError, yaml.YAMLError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{path} holds no QuantizeConfig of cache-dit's ({type(error).__name__}: {error}); "
            "export again"
        ) from error
    if not whole or default != _DEFAULT:
        raise QSearchError(
            f"{path} must quantize one region, the whole model, with {_DEFAULT} by default; it has "
            f"{str(said)[:120]!r}"
        )
    schemes = {kind: Scheme.parse(text) for text, kind in TYPES.items()}
    for name, kind in plan.items():
        graph.layer(name)
        if kind not in schemes:
            raise QSearchError(f"{path}: no scheme means {kind} of {name}")
    made = {layer.name: KEEP for layer in graph}
    for layer in graph:
        given = _type(layer.name, plan, kept) if layer.kind == "linear" else None
        scheme = schemes[given] if given else KEEP
        if nearest(scheme, layer) != scheme:
            raise QSearchError(f"{path}: cache-dit has no {given} for {layer.name}")
        made[layer.name] = scheme
    return made
