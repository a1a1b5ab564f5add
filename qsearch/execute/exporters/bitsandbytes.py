"""bitsandbytes' configuration for diffusers: one format, and the list of the layers that don't get
it.

It has two formats, so a plan has one format beside `keep`: int8 with 8-bit tokens (LLM.int8, whose
outlying channels stay in 16 bits) or 4-bit floats in blocks of 64 (`fp4`; its second-smallest level
is 1/192 of the largest where e2m1 has 1/12). The skip list is matched loosely: the last part of a
layer's name alone matches an entry too. A plan that such a match would change is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ..exporting import Export
from ..nearest import divides
from ..nearest import nearest as nearest_of

needs = ("bitsandbytes",)
writes_weights = False
fuses = False
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
FILE = "bitsandbytes.json"
_EIGHT, _FOUR = Scheme.parse("int8-c+a8"), Scheme.parse("e2m1-g64")
either = (_EIGHT.format, _FOUR.format)


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers: 8 bits with 8-bit tokens, or 4-bit floats where blocks of 64 fill the rows."""
    if layer.kind != "linear":
        return nearest_of(scheme, layer, [])
    found = nearest_of(
        scheme,
        layer,
        [*([] if layer.parts else [_EIGHT]), *([_FOUR] if divides(64, layer) else [])],
    )
    return Scheme(
        found.format, found.group, found.activation, found.grain
    )  # the tool chooses codes itself


def write(job: Export, folder: Path) -> list[Path]:
    """bitsandbytes.json: the arguments of diffusers' `BitsAndBytesConfig`."""
    used = sorted({str(s) for s in job.plan.layers.values() if s != KEEP})
    if len(used) > 1:
        raise QSearchError(
            "bitsandbytes has one format for all layers it quantizes; the plan has "
            f"{' and '.join(used)}: allocate with --for bitsandbytes"
        )
    linear = [layer.name for layer in job.graph if layer.kind == "linear"]
    skipped = [name for name in linear if job.plan.layers[name] == KEEP]
    for name in linear:
        if name not in skipped and _skips(name, skipped):
            raise QSearchError(
                f"bitsandbytes would skip {name} as well, since its last name is that of "
                "a layer that is kept; keep it too"
            )
    rules = (
        {"load_in_8bit": True}
        if used == [str(_EIGHT)]
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    )
    path = folder / FILE
    path.write_text(
        json.dumps({**rules, "llm_int8_skip_modules": skipped}, indent=2) + "\n", encoding="utf-8"
    )
    return [path]


def _skips(name: str, skipped: Iterable[str]) -> bool:
    """What diffusers' `_replace_with_bnb_linear` does."""
    return any(
        name.rpartition(".")[2] == entry or f"{entry}." in name or entry == name
        for entry in skipped
    )


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The one format at every linear layer that the list doesn't match."""
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        skipped = [str(name) for name in said["llm_int8_skip_modules"]]
        scheme = _EIGHT if said.get("load_in_8bit") is True else _FOUR
        known = said.get("load_in_8bit") is True or (
            said["load_in_4bit"] is True and said["bnb_4bit_quant_type"] == "fp4"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / FILE} holds no arguments of BitsAndBytesConfig "
            f"({type(error).__name__}: {error}); export again"
        ) from error
    if not known:
        raise QSearchError(
            f"{folder / FILE} asks for neither 8 bits nor fp4, which are what qsearch "
            "reads of bitsandbytes"
        )
    for name in skipped:
        graph.layer(name)
    return {
        layer.name: scheme if layer.kind == "linear" and not _skips(layer.name, skipped) else KEEP
        for layer in graph
    }
