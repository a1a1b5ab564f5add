"""Files for ComfyUI of whole models by name, beside the names of their original checkpoints.

    PYTHONPATH=. python notebooks/figures/original_names.py [pixart-alpha flux-dev sdxl]
        [--folder runs/original-names]

The architecture of a card with random weights in bf16, saved in shards; a plan that gives each of
ComfyUI's formats in turn to the layers of the original that can have it (Q, K and V where the
original holds them as one layer are one); `qsearch.export` to one file. `names`: tensors of the
file without what formats add to a weight (scales, markers); `wanted`: those of the original, as
tests/execute/test_original_names.py lists them after the models' own code, or, `by` diffusers, as
many as its own converter turns back into every name of the model. `fused`: layers of the file that
hold several of diffusers'. `as planned`: layers whose format is the plan's when the file is read
back. Peak memory is that of the process. Writes original_names.json.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figure import publish
from safetensors import safe_open
from sizes import GIB, save_denoiser

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.exporters import comfyui
from qsearch.execute.exporting import formats
from qsearch.execute.exports import export
from qsearch.graphs.extraction import extract
from qsearch.graphs.families import cards
from tests.execute.test_original_names import FLUX_DEV, PIXART_ALPHA

MODELS = ("pixart-alpha", "flux-dev", "sdxl")
#: of PixArt the checkpoints of 256 and 512 px, as the card: those of 1,024 have two embedders more
LISTS = {
    "pixart-alpha": {n for n in PIXART_ALPHA if not n.startswith(("csize_", "ar_"))},
    "flux-dev": FLUX_DEV,
}
FORMATS = ("int8-c+a8", "e4m3-t", "int8-c+a8~rotate", "nvfp4", "int4-c+a4~rotate", "mxfp8", "keep")
#: what a format adds beside a weight
ADDED = (
    "comfy_quant",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "full_precision_matrix_mult",
)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--folder", type=Path, default=Path("runs/original-names"))
    options = parser.parse_args()
    rows = [measured(name, options.folder / name) for name in options.models]
    publish(__file__, rows, title="Names of original checkpoints", seed=0)


def measured(name: str, place: Path) -> dict[str, Any]:
    """Save, plan, export and read back one model."""
    shutil.rmtree(place, ignore_errors=True)
    folder = save_denoiser(name, place / "pipeline", GIB)
    shards = len(list(folder.glob("*.safetensors")))
    model, inputs = cards.load(name)
    graph = extract(model, inputs, name=name)
    plan = turns(graph)
    began = time.perf_counter()
    [file] = export(plan, graph, place / "pipeline", "comfyui", place / "out")
    seconds = time.perf_counter() - began
    with safe_open(file, "pt") as opened:
        held = set(opened.keys())
        bare = {n for n in held if n.rpartition(".")[2] not in ADDED}
        wanted = LISTS[name] if name in LISTS else by_diffusers(opened, model, bare)
    read = comfyui.read(file.parent, graph)
    planned = formats(plan.layers)
    shutil.rmtree(folder)
    return {
        "model": name,
        "weights (B)": sum(x.numel() for x in model.state_dict().values()) / 1e9,
        "shards": shards,
        "names": len(bare),
        "wanted": len(wanted),
        "missing": len(wanted - bare),
        "others": len(bare - wanted),
        "by": "list" if name in LISTS else "diffusers",
        "fused": len(comfyui.tied(graph)),
        "layers": len(planned),
        "as planned": sum(read[n] == s for n, s in planned.items()),
        "formats": len({str(s) for s in planned.values() if s != KEEP}),
        "GB": file.stat().st_size / 1e9,
        "export s": seconds,
        "peak GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def turns(graph: OpGraph) -> Plan:
    """ComfyUI's formats by turns; layers that the original holds as one have the same."""
    groups: dict[str, tuple[str, ...]] = {n: g for g in comfyui.tied(graph) for n in g}
    chosen: dict[str, Scheme] = {}
    given = 0
    for layer in graph:
        if layer.name in chosen:
            continue
        parts = [graph.layer(n) for n in groups.get(layer.name, (layer.name,))]
        for scheme in (FORMATS[(given + i) % len(FORMATS)] for i in range(len(FORMATS))):
            asked = Scheme.parse(scheme)
            if all(asked == KEEP or comfyui.nearest(asked, p) == asked for p in parts):
                break
        given += 1
        chosen |= {p.name: asked for p in parts}
    return Plan.make(graph, {n: str(s) for n, s in chosen.items()})


def by_diffusers(opened: Any, model: Any, bare: set[str]) -> set[str]:
    """The file's own names where diffusers' converter makes all names of the model of them, and no
    others; else none.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[type(model).__name__]["checkpoint_mapping_fn"]
    held: Mapping[str, Any] = {n: opened.get_tensor(n) for n in bare}
    return (
        bare if set(convert(held, config=dict(model.config))) == set(model.state_dict()) else set()
    )


if __name__ == "__main__":
    main()
