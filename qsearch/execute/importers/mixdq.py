"""MixDQ: plans (layer: bits) and sensitivity tables (layer: a value at 2, 4 and 8 bits) as its
authors publish them in YAML.

Names carry `model.` before diffusers' own. Weights are asymmetric a channel, which the published
tables were measured with (the released code is symmetric today); values of at most 1 are SSIM,
others decibels of signal over noise. Sources state neither error bars nor, in these files, a floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.errors import QSearchError
from ...core.graph import OpGraph
from ...core.scheme import KEEP, Scheme
from ..importing import Found, parse, peek

BITS = (2, 4, 8)
_PREFIX = "model."


def recognises(path: Path) -> bool:
    """Names with dots, whose values are numbers of bits or three measurements."""
    said = peek(path)
    if not isinstance(said, dict) or not said or path.suffix == ".json":
        return False
    return all(isinstance(k, str) and (_bits(v) or _measured(v)) for k, v in said.items())


def _bits(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _measured(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(BITS)
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    )


def read(path: Path, graph: OpGraph) -> Found:
    """A plan, or the rows of a table in noise power (metric `noise`), or in what is missing to an
    SSIM of 1 (metric `ssim`).
    """
    said = parse(path)
    if not isinstance(said, dict) or not said:
        raise QSearchError(
            f"{path} must hold layers and their bits; it holds {type(said).__name__}"
        )
    named: dict[str, Any] = {}
    for name, value in said.items():
        layer = graph.layer(str(name).removeprefix(_PREFIX)).name
        if layer in named:
            raise QSearchError(f"{path} names {layer} twice")
        named[layer] = value
    if all(_measured(v) for v in named.values()):
        return Found(
            rows=_rows(path, named),
            notes=("the source states no error bars and no floor; both stand as 0",),
        )
    return Found(
        {name: _scheme(path, name, bits) for name, bits in named.items()},
        notes=("weights are asymmetric integers a channel",),
    )


def _scheme(path: Path, name: str, bits: Any) -> Scheme:
    if not _bits(bits) or bits not in (*range(2, 9), 16, 32):
        raise QSearchError(
            f"{path} gives {name} {str(bits)[:40]!r}; a layer has 2 to 8, 16 or 32 bits"
        )
    return KEEP if bits >= 16 else Scheme.parse(f"uint{bits}-c")


def _rows(path: Path, named: Mapping[str, list[float]]) -> tuple[dict[str, Any], ...]:
    values = [v for row in named.values() for v in row]
    if not all(math.isfinite(v) for v in values):
        raise QSearchError(f"{path} holds values that are no numbers")
    similar = max(values) <= 1
    fixed = {
        "step": 0,
        "metric": "ssim" if similar else "noise",
        "error": 0.0,
        "floor": 0.0,
        "estimator": "mixdq",
        "seed": 0,
    }
    return tuple(
        {
            "site": name,
            "scheme": f"uint{bits}-c",
            "estimate": 1 - v if similar else 10 ** (-v / 10),
            **fixed,
        }
        for name, row in named.items()
        for bits, v in zip(BITS, row, strict=True)
    )
