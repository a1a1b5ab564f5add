"""NVIDIA ModelOpt: `quant_cfg` as the list that `mtq.quantize` takes, a quantizer a layer by its
full name, and `hf_quant_config.json` where it can say it.

The list opens by switching everything off, later entries win, and names hold no wildcards, so that
a layer gets what the plan says or nothing. ModelOpt makes the codes itself: scales by the largest
weight, as min-max here does for symmetric formats, the only ones it has. YAML, for JSON has no
integer keys (`block_sizes: {-1: 32}`). `hf_quant_config.json` names a few algorithms alone, and is
written where all of the plan has one.
"""

from __future__ import annotations

import json
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
takes: tuple[str, ...] = ("denoiser", "text encoder", "vae")
CONFIG, CHECKPOINT = "quant_cfg.yaml", "hf_quant_config.json"
_KINDS = ("linear", "conv1d", "conv2d", "conv3d")
#: block format -> exponent and mantissa bits of its codes, its block, and the type of its scales
BLOCKS = {
    "nvfp4": ([2, 1], 16, [4, 3]),
    "mxfp4": ([2, 1], 32, [8, 0]),
    "mxfp6": ([2, 3], 32, [8, 0]),
    "mxfp8": ([4, 3], 32, [8, 0]),
}
#: scheme -> the algorithm that `hf_quant_config.json` calls it
ALGORITHMS = {"nvfp4": "W4A16_NVFP4", "mxfp8": "MXFP8", "int8-c": "W8A16"}


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Symmetric integers and e4m3 a channel or a tensor, integers in groups, block formats; no zero
    points, no inputs, no methods but its own.
    """
    scheme = replace(scheme, method="")
    if layer.kind not in _KINDS or layer.channel_axis != 0 or layer.parts:
        return nearest_of(scheme, layer, [])
    linear = layer.kind == "linear"
    sizes = [
        "t",
        "c",
        *(
            f"g{g}"
            for g in sorted({16, 32, 64, 128, 256, *([scheme.group] if scheme.group > 0 else [])})
            if linear and divides(g, layer)
        ),
    ]
    names = [f"int{bits}-{size}" for bits in range(2, 9) for size in sizes]
    names += [
        "e4m3-t",
        "e4m3-c",
        *(form for form, (_, block, _) in BLOCKS.items() if linear and divides(block, layer)),
    ]
    return nearest_of(scheme, layer, map(Scheme.parse, names))


def entry(scheme: Scheme) -> dict[str, Any]:
    """What a layer's weight quantizer is set to."""
    if scheme.format in BLOCKS:
        bits, block, scales = BLOCKS[scheme.format]
        return {
            "num_bits": bits,
            "block_sizes": {-1: block, "type": "dynamic", "scale_bits": scales},
        }
    plain: Any = scheme.bits if scheme.family == "int" else [4, 3]
    if scheme.group > 0:
        return {"num_bits": plain, "block_sizes": {-1: scheme.group}}
    return {"num_bits": plain, "axis": 0 if scheme.group == 0 else None}


def scheme_of(said: Any) -> Scheme:
    """The scheme that the settings of a weight quantizer mean. Raises `QSearchError` for settings
    that no scheme here means.
    """
    try:
        bits, blocks = said["num_bits"], said.get("block_sizes") or {}
        form = f"int{bits}" if isinstance(bits, int) else "e{}m{}".format(*map(int, bits))
        sizes = {str(k): v for k, v in blocks.items()}
        if "scale_bits" in sizes:
            own = (list(bits), sizes["-1"], list(sizes["scale_bits"]))
            return Scheme.parse(
                next((name for name, known in BLOCKS.items() if known == own), form + "-block")
            )
        if sizes.get("type", "static") == "static" and set(sizes) - {"type"} == {"-1"}:
            return Scheme.parse(f"{form}-g{int(sizes['-1'])}")
        axis = said.get("axis")
        if sizes or axis not in (0, None):
            raise QSearchError(f"blocks and axes of {str(said)[:80]!r} mean no scheme here")
        return Scheme.parse(f"{form}-{'t' if axis is None else 'c'}")
    except MISSHAPEN as error:
        raise QSearchError(
            f"a quantizer has num_bits, axis or block_sizes; given {str(said)[:80]!r} "
            f"({type(error).__name__}: {error})"
        ) from error


def write(job: Export, folder: Path) -> list[Path]:
    """quant_cfg.yaml, and hf_quant_config.json where every scheme of the plan has a name there."""
    import yaml

    chosen = {
        layer.name: scheme for layer in job.graph if (scheme := job.plan.layers[layer.name]) != KEEP
    }
    entries = [
        {"quantizer_name": f"{name}.weight_quantizer", "cfg": entry(scheme)}
        for name, scheme in chosen.items()
    ]
    config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *entries], "algorithm": "max"}
    path = folder / CONFIG
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    named = {
        name: ALGORITHMS.get(str(scheme.weight_only)) or _grouped(scheme)
        for name, scheme in chosen.items()
    }
    if not all(named.values()):
        return [path]
    layers = {
        n: {"quant_algo": a, **({"group_size": s.group} if (s := chosen[n]).group > 0 else {})}
        for n, a in named.items()
    }
    said = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": None,
        "quantized_layers": layers,
    }
    checkpoint = folder / CHECKPOINT
    checkpoint.write_text(
        json.dumps({"producer": {"name": "qsearch"}, "quantization": said}, indent=2) + "\n",
        encoding="utf-8",
    )
    return [path, checkpoint]


def _grouped(scheme: Scheme) -> str | None:
    return "W4A16_AWQ" if scheme.format == "int4" and scheme.group > 0 else None


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The list's entries, whose names must be layers."""
    import yaml

    try:
        said = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        first, *entries = said["quant_cfg"]
        if first != {"quantizer_name": "*", "enable": False}:
            raise QSearchError(
                f"{folder / CONFIG} must open by switching every quantizer off; it opens "
                f"with {str(first)[:80]!r}"
            )
        made = {layer.name: KEEP for layer in graph}
        for item in entries:
            name, dot, which = str(item["quantizer_name"]).rpartition(".")
            graph.layer(name)
            if which != "weight_quantizer" or not dot:
                raise QSearchError(
                    f"{folder / CONFIG} sets {item['quantizer_name']}, which is no weight quantizer"
                )
            made[name] = scheme_of(item["cfg"])
        return made
    except (OSError, yaml.YAMLError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{folder / CONFIG} is no configuration of ModelOpt's "
            f"({type(error).__name__}: {error}); export again"
        ) from error
