"""The codes that a plan's methods find for one layer's weight, laid out as rows: what exporters
pack into their tools' formats.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..choices.codes import AbstractCodes, Codes
from ..choices.floats import FloatFormat
from ..choices.format import element_of
from ..choices.quantization import quantize, quantize_parts
from ..core.graph import LayerSpec
from ..core.scheme import Scheme
from .exporting import Export

_AT_ONCE = 2**18  # weights


@dataclass(frozen=True)
class Rows:
    """`level`: fp32 [rows, groups, group], what the tool multiplies: integers from 0 (`uint`),
    about 0 (`int`), or the values of a float format.

    `scale`, `zero`: fp32 [rows, groups]; a weight is scale * (level - zero), and zero is 0 but for
    `uint`.
    """

    level: Tensor
    scale: Tensor
    zero: Tensor


def rows(job: Export, layer: LayerSpec, weight: Tensor) -> Rows:
    """The weight of `layer` in its plan's scheme; integers, floats and block formats (codebooks
    have no levels in common).

    Groups fill the rows without a rest (`nearest.divides`), so that those of a long skip's parts
    are those of the whole row. Min-max looks at one row at a time and gets a few at once, since
    quantizing takes many times the memory of what is quantized.
    """
    scheme = job.plan.layers[layer.name]
    alone = (
        scheme.method in ("", "minmax")
        and scheme.group >= 0
        and scheme.format != "nvfp4"
        and layer.channel_axis == 0
    )
    if not alone or weight.numel() <= _AT_ONCE:
        return _levels(coded(job, layer, weight), scheme)
    count, done = max(1, _AT_ONCE * weight.shape[0] // weight.numel()), 0
    whole: Rows | None = None
    for piece in weight.split(count):
        made = _levels(coded(job, layer, piece), scheme)
        whole = whole or Rows(
            *(
                part.new_empty((len(weight), *part.shape[1:]))
                for part in (made.level, made.scale, made.zero)
            )
        )
        for place, part in zip(
            (whole.level, whole.scale, whole.zero), (made.level, made.scale, made.zero), strict=True
        ):
            place[done : done + len(part)] = part
        done += len(piece)
    assert whole is not None
    return whole


def coded(job: Export, layer: LayerSpec, weight: Tensor) -> Codes:
    """The same before its parts are put together: block scales and the tensor's own apart, as nvfp4
    stores them.
    """
    held = job.calibration.get(layer.name)
    scheme = job.plan.layers[layer.name]
    made = quantize(
        weight,
        scheme,
        axis=layer.channel_axis,
        layer=layer.name,
        moments=None if held is None else held.moments,
    )
    return _plain(made.code)


def pieces(job: Export, layer: LayerSpec, weight: Tensor) -> list[Rows]:
    """`rows` for each part of a long skip's weight, whose channels have scales of their own; of
    other layers, and of groups that fit every part, the one.
    """
    scheme = job.plan.layers[layer.name]
    if scheme.group or not layer.parts:
        return [rows(job, layer, weight)]
    held = job.calibration.get(layer.name)
    moments = None if held is None else held.moments
    made = quantize_parts(
        weight,
        scheme,
        axis=layer.channel_axis,
        splits=layer.parts,
        layer=layer.name,
        moments=moments,
    )
    return [_levels(_plain(part.code), scheme) for part in made]


def _plain(code: AbstractCodes) -> Codes:
    assert isinstance(code, Codes)  # what exporters offer are formats with such codes
    return code


def _levels(code: Codes, scheme: Scheme) -> Rows:
    scale, zero = code.scale[..., 0] * code.unit, code.zero[..., 0]
    if scheme.family == "uint":
        return Rows(code.codes.float(), scale, zero)
    if scheme.family == "int":
        half = 2 ** (scheme.bits - 1)
        return Rows(code.codes.float() - half, scale, zero - half)
    form = FloatFormat.named(element_of(scheme))
    own = 1.0 if scheme.family == "block" else 2.0**form.highest
    return Rows(form.values(code.codes.device)[code.codes.int()], scale / own, zero)
