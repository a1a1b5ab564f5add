"""A step policy beside an FP8 or NVFP4 configuration: full-precision inputs in the first and last
sampler steps, rounded ones between (schema 1, `first_last_n`).

vLLM-Omni, SGLang, TensorRT-LLM and diffusers' Cosmos 3 read it from
`quantization_config.runtime.diffusion_step_policy` of the denoiser's config.json. Weights are the
same at every step and inputs are rounded in all layers or in none, so that a plan over ranges fits
where it says just that, in one of the two formats. The same steps stand in `protected_steps.txt` as
a list, the last ones counted from the end, as Unsloth's `UNSLOTH_NVFP4_PROTECT_STEPS` takes them.
Layers that are kept stand in `ignore` by their own names and by TensorRT-LLM's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...core.errors import ArtifactError, QSearchError
from ...core.graph import LayerSpec, OpGraph
from ...core.plan import Plan
from ...core.scheme import KEEP, Scheme
from ..exporting import Export, formats
from ..one_algorithm import ALGORITHMS, EITHER, algorithm, ignored, modules
from ..one_algorithm import nearest as nearest_of
from ..weights import copy_config

needs: tuple[str, ...] = ()
writes_weights = False
fuses = False
has_steps = True
takes: tuple[str, ...] = ("denoiser",)
either = EITHER
#: the one component that readers of the schema know
_SCOPE = "transformer"
PROTECTED = "protected_steps.txt"


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers: FP8 weights and inputs, a scale a tensor each, or NVFP4 on both sides."""
    return nearest_of(scheme, layer)


def write(job: Export, folder: Path) -> list[Path]:
    """config.json with a configuration of ModelOpt's, its skip list and the policy; the list of
    protected steps.

    Raises:
        QSearchError: the denoiser is no transformer, the plan has both formats, or its ranges are
            no `first_last_n`.
    """
    if job.component != _SCOPE:
        raise QSearchError(
            f"a step policy is of a component called {_SCOPE}, the only one that its readers know; "
            f"this denoiser is {job.component}"
        )
    used = algorithm(job.plan.layers, "a step policy")
    first, last = (0, 0) if job.steps is None else _ends(job.steps, job)
    policy = {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "scope": [_SCOPE],
        "default_mode": "native",
        "first_steps": {"count": first, "mode": "a16"},
        "last_steps": {"count": last, "mode": "a16"},
        "overlap": "a16",
        "reasoner": "a16",
    }
    kept = [x.name for x in job.graph if job.plan.layers[x.name] == KEEP and x.kind != "linear"]
    kept += ignored(job.graph, job.plan.layers)
    config = {
        "quant_method": "modelopt",
        "quant_algo": used,
        "ignore": kept,
        "runtime": {"diffusion_step_policy": policy},
    }
    protected = folder / PROTECTED
    protected.write_text(_listed(first, last) + "\n", encoding="utf-8")
    return [copy_config(job.weights, folder, quantization_config=config), protected]


def _listed(first: int, last: int) -> str:
    """Steps at both ends, those at the end counted from there: `0,1,-1`."""
    return ",".join(map(str, [*range(first), *range(-last, 0)]))


def _ends(steps: Plan, job: Export) -> tuple[int, int]:
    """How many of the sampler's steps at each end round no inputs."""
    parts = [steps.at(i) for i in range(len(steps.steps))]
    rounds = [any(s.activation for s in part.values()) for part in parts]
    native = [formats(part) for part, has in zip(parts, rounds, strict=True) if has]
    weights = {tuple(s.weight_only for s in part.values()) for part in parts}
    if len(weights) != 1 or not native or any(layers != native[0] for layers in native):
        raise QSearchError(
            "a step policy switches the inputs of all layers at once and leaves weights "
            "alone; this plan over ranges does more"
        )
    first, last = rounds.index(True), rounds[::-1].index(True)
    if not all(rounds[first : len(rounds) - last]):
        raise QSearchError(
            "a step policy has full-precision inputs at its ends alone; of the plan's "
            f"{len(rounds)} ranges {rounds} round them"
        )
    members = steps.steps.members(job.sampler_steps)
    return (
        sum(len(m) for m in members[:first]),
        sum(len(m) for m in members[len(members) - last :]),
    )


def read(folder: Path, graph: OpGraph) -> dict[str, Scheme]:
    """FP8 or NVFP4 at every layer that is not ignored; the policy's form is checked, and that the
    list of protected steps says the same.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))[
            "quantization_config"
        ]
        left_out = {str(name) for name in config["ignore"]}
        policy = config["runtime"]["diffusion_step_policy"]
        algorithm = config["quant_algo"]
        good = (
            algorithm in ALGORITHMS.values()
            and policy["schema_version"] == 1
            and policy["type"] == "first_last_n"
        )
        counts = [policy[end]["count"] for end in ("first_steps", "last_steps")]
        listed = (folder / PROTECTED).read_text(encoding="utf-8").strip()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder / 'config.json'} holds no step policy ({type(error).__name__}: "
            f"{error}); export again"
        ) from error
    if not good or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise QSearchError(
            f"{folder / 'config.json'} must hold FP8 or NVFP4 with a first_last_n policy of schema "
            f"1; it holds {algorithm!r} with {policy!r}"
        )
    count = listed.count(",") + 1 if listed else 0
    if count != sum(counts) or listed != _listed(*counts):
        raise QSearchError(
            f"{folder / PROTECTED} protects the steps {listed or 'none'}, and the policy "
            f"{counts[0]} at the start and {counts[1]} at the end; export again"
        )
    own = modules(graph)
    for name in left_out - set(own.values()):
        graph.layer(name)
    scheme = next(s for s, name in ALGORITHMS.items() if name == algorithm)
    return {x.name: KEEP if {x.name, own.get(x.name, x.name)} & left_out else scheme for x in graph}
