"""TensorRT-LLM's visual generation: the `quant_config` of its arguments, FP8 or NVFP4 for all
layers but those that it ignores, which it quantizes while it loads.

Weights and inputs are quantized, inputs at every call with a scale a tensor (NVFP4: in blocks of 16
besides). It has no algorithm for a single layer: a plan that mixes the two is refused. Names to
ignore are compared with its own modules', in which queries, keys and values are one (`qkv_proj`,
`add_qkv_proj`) and the layers of a feed-forward are `up_proj` and `down_proj`: a layer that is kept
stands in the list by both names. Its embedders of timesteps, captions and guidance are diffusers'
own modules, which it never quantizes, so that they are offered nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...core.errors import MISSHAPEN, ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.scheme import KEEP, Scheme
from ..exporting import Export
from ..one_algorithm import ALGORITHMS, EITHER, algorithm, ignored, modules
from ..one_algorithm import nearest as nearest_of

needs: tuple[str, ...] = ()
writes_weights = False
fuses = True
has_steps = False
takes: tuple[str, ...] = ("denoiser",)
either = EITHER
FILE = "visual_gen.yaml"
_EMBEDDER = re.compile(r"(^|[._])(time|timestep|text|guidance|caption)\w*embed\w*\.")


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers outside of embedders: FP8 weights and inputs, a scale a tensor each, or NVFP4
    on both sides.
    """
    return KEEP if _EMBEDDER.search(layer.name) else nearest_of(scheme, layer)


def write(job: Export, folder: Path) -> list[Path]:
    """visual_gen.yaml: what `VisualGenArgs.from_yaml` and `trtllm-serve --visual_gen_args` read.

    Raises:
        QSearchError: the plan has both formats.
    """
    import yaml

    layers = job.plan.layers
    one = algorithm(layers, "TensorRT-LLM's quant_config")
    config = {
        "quant_algo": one if any(scheme != KEEP for scheme in layers.values()) else None,
        "dynamic": True,
        "ignore": ignored(job.graph, layers),
    }
    path = folder / FILE
    path.write_text(yaml.safe_dump({"quant_config": config}, sort_keys=False), encoding="utf-8")
    return [path]


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """The algorithm at every linear layer that is not ignored."""
    import yaml

    path = folder / FILE
    try:
        said: Any = yaml.safe_load(path.read_text(encoding="utf-8"))["quant_config"]
        left_out, named, dynamic = list(said["ignore"]), said["quant_algo"], said["dynamic"]
        known = {None: KEEP} | {name: scheme for scheme, name in ALGORITHMS.items()}
        scheme = known[named]
    except (OSError, yaml.YAMLError, *MISSHAPEN) as error:
        raise ArtifactError(
            f"{path} holds no quant_config of TensorRT-LLM's, FP8 or NVFP4 "
            f"({type(error).__name__}: {error}); export again"
        ) from error
    if dynamic is not True:
        raise QSearchError(f"{path} must ask for dynamic quantization: it holds no weights")
    own = modules(graph)
    for name in left_out:
        if name not in (*own, *own.values()):
            graph.layer(str(name))
            raise QSearchError(f"{path} ignores {name}, which is no linear layer")
    made = {layer.name: KEEP for layer in graph}
    for name, module in own.items():
        if name in left_out or module in left_out:
            continue
        if nearest(scheme, graph.layer(name)) != scheme:
            raise QSearchError(
                f"{path}: TensorRT-LLM has no {named} for {name}, which must be kept"
            )
        made[name] = scheme
    return made
