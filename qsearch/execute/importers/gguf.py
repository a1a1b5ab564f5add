"""GGUF: the types of a file's tensors, as gguf's own reader sees them; no tensor's data is looked
at.

Legacy types are schemes to the bit. K-quants and IQ types keep scales of scales and have no scheme:
the nearest of the same size stands for them, and is said. Tensors have diffusers' names, with or
without `model.diffusion_model.`; those of original checkpoints, which fuse queries, keys and
values, are refused by name, since which rows are whose is the model's business.
"""

from __future__ import annotations

from pathlib import Path

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import OpGraph
from ...core.scheme import KEEP, Scheme
from ...measure.shards import key
from ..exporters.gguf import TYPES
from ..importing import Found

#: types that no scheme means exactly -> the nearest of the same size
NEAREST = {
    "Q2_K": "uint2-g64",
    "Q3_K": "int3-g32",
    "Q4_K": "int4-g32",
    "Q5_K": "int5-g32",
    "Q6_K": "int6-g32",
    "Q8_K": "int8-g256",
    "IQ4_NL": "int4-g32",
    "IQ4_XS": "int4-g64",
    "IQ3_S": "int3-g32",
    "IQ3_XXS": "int3-g128",
    "IQ2_S": "int2-g32",
    "IQ2_XS": "int2-g64",
}
EXACT = {**TYPES, "MXFP4": "mxfp4", "NVFP4": "nvfp4"}
_PLAIN = ("F32", "F16", "BF16", "F64")
_PREFIXES = ("model.diffusion_model.", "")


def recognises(path: Path) -> bool:
    """A file that begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read(path: Path, graph: OpGraph) -> Found:
    """Schemes of the layers by the types of their tensors."""
    from importlib import util

    if util.find_spec("gguf") is None:
        raise QSearchError(
            "importing GGUF files needs gguf, which is not installed: pip install gguf"
        )
    import gguf

    path = path / "model.gguf" if path.is_dir() else path
    try:
        tensors = {
            str(t.name): (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)))
            for t in gguf.GGUFReader(path).tensors
        }
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
        UnicodeDecodeError,
        AttributeError,
    ) as error:
        raise ArtifactError(
            f"{path} is not readable as GGUF ({type(error).__name__}: {error}); copy it again"
        ) from error
    prefix = next((p for p in _PREFIXES if any(p + key(layer) in tensors for layer in graph)), "")
    keys = {prefix + key(layer): layer for layer in graph}
    layers: dict[str, Scheme] = {}
    rounded: dict[str, int] = {}
    for name, (kind, shape) in tensors.items():
        layer = keys.get(name)
        if layer is None:
            if kind not in _PLAIN:
                graph.layer(
                    name.removeprefix(prefix).removesuffix(".weight")
                )  # says which layer is nearest
            continue
        if len(shape) <= len(layer.weight_shape) and _elements(shape) != layer.weights:
            raise QSearchError(
                f"{path}: {name} has shape {shape}, {graph.model} says {layer.weight_shape}"
            )
        if kind not in (*EXACT, *NEAREST, *_PLAIN):
            raise QSearchError(f"{path}: {name} has type {kind}, which no scheme comes near")
        layers[layer.name] = (
            KEEP if kind in _PLAIN else Scheme.parse(EXACT.get(kind) or NEAREST[kind])
        )
        if kind in NEAREST:
            rounded[kind] = rounded.get(kind, 0) + 1
    return Found(
        layers,
        notes=tuple(
            f"{count} tensors of type {kind} stand as {NEAREST[kind]}, the nearest of their size"
            for kind, count in rounded.items()
        ),
    )


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total
