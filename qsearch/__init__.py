"""qsearch: which layers of a diffusion model stand few bits, why, and what to do. The table of contents: nouns and verbs, loaded when used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.attribution import Attribution as Attribution
    from .core.errors import ArtifactError as ArtifactError
    from .core.errors import InfeasibleBudget as InfeasibleBudget
    from .core.errors import QSearchError as QSearchError
    from .core.graph import LayerSpec as LayerSpec
    from .core.graph import OpGraph as OpGraph
    from .core.latency import Latency as Latency
    from .core.plan import BitPlan as BitPlan
    from .core.plan import Budget as Budget
    from .core.scheme import Scheme as Scheme
    from .core.stepplan import StepPlan as StepPlan
    from .core.table import SensitivityTable as SensitivityTable
    from .core.trials import Trials as Trials
    from .decide.allocation import allocate as allocate
    from .decide.allocation import allocate_frontier as allocate_frontier
    from .decide.constraints import Constraints as Constraints
    from .decide.objectives import Objective as Objective
    from .decide.refinement import refine as refine
    from .decide.request import AllocationRequest as AllocationRequest
    from .decide.stepwise import allocate_steps as allocate_steps
    from .execute.exports import export as export
    from .execute.runtime import apply as apply
    from .graphs.extraction import extract as extract
    from .learn.explaining import explain as explain
    from .learn.fitting import Study as Study
    from .learn.fitting import fit as fit
    from .learn.surrogate import Surrogate as Surrogate
    from .measure.evaluation import evaluate as evaluate
    from .measure.options import ProfileOptions as ProfileOptions
    from .measure.profiling import profile as profile
    from .measure.reconstruction import reconstruct as reconstruct
    from .measure.simulation import simulate as simulate
    from .measure.stepwise import simulate_steps as simulate_steps
    from .stages.run import run as run

#: public name -> module that defines it
_CONTENTS = {
    "Attribution": "core.attribution",
    "ArtifactError": "core.errors",
    "InfeasibleBudget": "core.errors",
    "QSearchError": "core.errors",
    "LayerSpec": "core.graph",
    "OpGraph": "core.graph",
    "Latency": "core.latency",
    "BitPlan": "core.plan",
    "Budget": "core.plan",
    "Scheme": "core.scheme",
    "StepPlan": "core.stepplan",
    "SensitivityTable": "core.table",
    "Trials": "core.trials",
    "Constraints": "decide.constraints",
    "Objective": "decide.objectives",
    "AllocationRequest": "decide.request",
    "allocate": "decide.allocation",
    "allocate_frontier": "decide.allocation",
    "allocate_steps": "decide.stepwise",
    "refine": "decide.refinement",
    "apply": "execute.runtime",
    "export": "execute.exports",
    "extract": "graphs.extraction",
    "Study": "learn.fitting",
    "Surrogate": "learn.surrogate",
    "explain": "learn.explaining",
    "fit": "learn.fitting",
    "evaluate": "measure.evaluation",
    "ProfileOptions": "measure.options",
    "profile": "measure.profiling",
    "reconstruct": "measure.reconstruction",
    "simulate": "measure.simulation",
    "simulate_steps": "measure.stepwise",
    "run": "stages.run",
}
__all__ = sorted(_CONTENTS)


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"module 'qsearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_CONTENTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
