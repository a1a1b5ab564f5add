"""NVIDIA ModelOpt: `quant_cfg` (a list, or the dictionary of older versions) as YAML or JSON, and
`hf_quant_config.json` of a checkpoint.

Names are shell patterns over `LAYER.weight_quantizer`, later entries win, `enable: false` keeps a
layer. Weights alone are imported: static ranges of inputs are no part of these files, and
ModelOpt's dynamic ones are symmetric. In `hf_quant_config.json` an algorithm stands for the format
of its weights.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...core.errors import MISSHAPEN, QSearchError, nearest
from ...core.graph import OpGraph
from ...core.scheme import KEEP, Scheme
from ..exporters.modelopt import CONFIG, scheme_of
from ..importing import Found, parse, peek

#: algorithm -> scheme of the weights, `G` for the group that the file states
ALGORITHMS = {
    "FP8": "e4m3-t",
    "FP8_PER_CHANNEL_PER_TOKEN": "e4m3-c",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "W4A8_NVFP4_FP8": "nvfp4",
    "W4A8_MXFP4_FP8": "mxfp4",
    "MXFP8": "mxfp8",
    "W4A16_AWQ": "int4-gG",
    "W4A8_AWQ": "int4-gG",
    "W8A16": "int8-c",
    "W8A8_SQ_PER_CHANNEL": "int8-c",
}


def recognises(path: Path) -> bool:
    """A file (or a folder with one) that holds `quant_cfg`, or `quantization` with a
    `quant_algo`.
    """
    said = peek(_file(path))
    return isinstance(said, dict) and (
        "quant_cfg" in said
        or (isinstance(said.get("quantization"), dict) and "quant_algo" in said["quantization"])
    )


def _file(path: Path) -> Path:
    names = (CONFIG, "hf_quant_config.json")
    return (
        next((path / name for name in names if (path / name).is_file()), path / names[0])
        if path.is_dir()
        else path
    )


def read(path: Path, graph: OpGraph) -> Found:
    """Schemes of the layers that an entry reaches."""
    file = _file(path)
    said = parse(file)
    try:
        if "quant_cfg" in said:
            return _quantizers(file, said["quant_cfg"], graph)
        return _checkpoint(file, said["quantization"], graph)
    except MISSHAPEN as error:
        raise QSearchError(
            f"{file} is no configuration of ModelOpt's ({type(error).__name__}: {error})"
        ) from error


def _quantizers(file: Path, said: Any, graph: OpGraph) -> Found:
    entries = (
        said
        if isinstance(said, list)
        else [{"quantizer_name": name, **_old(entry)} for name, entry in said.items()]
    )
    layers: dict[str, Scheme] = {}
    last: dict[str, Scheme] = {}
    notes: list[str] = []
    for entry in entries:
        pattern = str(entry["quantizer_name"])
        hit = [x for x in graph if fnmatchcase(f"{x.name}.weight_quantizer", pattern)]
        if not hit:
            if not any(
                fnmatchcase(f"{x.name}.{which}_quantizer", pattern)
                for x in graph
                for which in ("input", "output")
            ) and not _anything(pattern):
                raise QSearchError(
                    f"{file}: {pattern!r} matches no layer of "
                    f"{graph.model}{nearest(pattern.rpartition('.')[0], [x.name for x in graph])}"
                )
            notes.append("inputs and outputs are left as they are")
            continue
        cfg = entry.get("cfg")
        for layer in hit:
            if cfg is not None:
                last[layer.name] = scheme_of(cfg)
            on = entry.get("enable", True)
            layers[layer.name] = (
                last.get(layer.name, Scheme.parse("int8-t")) if on else KEEP
            )  # a quantizer that nothing set has 8 bits and one scale
    return Found(layers, notes=tuple(dict.fromkeys(notes)))


def _old(entry: Any) -> dict[str, Any]:
    """An entry of the dictionary form, which mixes settings and the switch."""
    settings = {k: v for k, v in entry.items() if k != "enable"}
    return ({"cfg": settings} if settings else {}) | (
        {"enable": entry["enable"]} if "enable" in entry else {}
    )


def _anything(pattern: str) -> bool:
    """A pattern that names no layer: attention's own quantizers, or a kind of module that this
    model lacks.
    """
    return pattern.startswith("*") or pattern == "default"


def _checkpoint(file: Path, said: Any, graph: OpGraph) -> Found:
    algorithm, notes = str(said["quant_algo"]), []
    if algorithm == "MIXED_PRECISION":
        entries = {str(name): entry for name, entry in said["quantized_layers"].items()}
        layers = {
            graph.layer(name).name: _scheme(file, str(entry["quant_algo"]), entry)
            for name, entry in entries.items()
        }
    else:
        excluded = [str(pattern) for pattern in said.get("exclude_modules") or []]
        chosen = _scheme(file, algorithm, said)
        linear = [x.name for x in graph if x.kind == "linear"]
        layers = {
            name: KEEP
            if any(fnmatchcase(name, p) or name.startswith(p.rstrip("*")) for p in excluded)
            else chosen
            for name in linear
        }
    notes.append("an algorithm stands for the format of its weights; inputs are left as they are")
    return Found(layers, notes=tuple(notes))


def _scheme(file: Path, algorithm: str, entry: Any) -> Scheme:
    if algorithm not in ALGORITHMS:
        raise QSearchError(
            f"{file}: ModelOpt's {algorithm!r} means no scheme here{nearest(algorithm, ALGORITHMS)}"
        )
    return Scheme.parse(
        ALGORITHMS[algorithm].replace("G", str(int(entry.get("group_size") or 128)))
    )
