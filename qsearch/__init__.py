"""qsearch: mixed-precision quantization of diffusion models. The table of contents: nouns and
verbs, loaded when used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.attribution import Attribution as Attribution
    from .core.cost import Budget as Budget
    from .core.errors import ArtifactError as ArtifactError
    from .core.errors import InfeasibleBudget as InfeasibleBudget
    from .core.errors import QSearchError as QSearchError
    from .core.graph import LayerSpec as LayerSpec
    from .core.graph import OpGraph as OpGraph
    from .core.latency import Latency as Latency
    from .core.plan import Plan as Plan
    from .core.scheme import Scheme as Scheme
    from .core.steps import StepRanges as StepRanges
    from .core.table import SensitivityTable as SensitivityTable
    from .core.trials import Trials as Trials
    from .decide.allocation import allocate as allocate
    from .decide.allocation import allocate_frontier as allocate_frontier
    from .decide.constraints import Constraints as Constraints
    from .decide.objectives import Objective as Objective
    from .decide.refinement import refine as refine
    from .decide.request import AllocationRequest as AllocationRequest
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
    "Plan": "core.plan",
    "Budget": "core.cost",
    "Scheme": "core.scheme",
    "StepRanges": "core.steps",
    "SensitivityTable": "core.table",
    "Trials": "core.trials",
    "Constraints": "decide.constraints",
    "Objective": "decide.objectives",
    "AllocationRequest": "decide.request",
    "allocate": "decide.allocation",
    "allocate_frontier": "decide.allocation",
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
    "run": "stages.run",
}
__all__ = sorted(_CONTENTS)


#: names of before -> what took their place
_RENAMED = {"BitPlan": "Plan", "StepPlan": "Plan", "allocate_steps": "allocate"}


#: modules of before -> the ones that took their place; of the public ones, until 0.3.0
_MOVED = {
    f"{__name__}.config": f"{__name__}.stages.config",
    f"{__name__}.job": f"{__name__}.stages.folder",
    f"{__name__}.pipeline": f"{__name__}.stages.run",
    f"{__name__}.measure.campaign": f"{__name__}.measure.plan_evaluation",
    f"{__name__}.measure.clean": f"{__name__}.measure.predicted_x0",
    f"{__name__}.measure.question": f"{__name__}.measure.estimation",
}
#: names that moved modules had -> their names of today, which plug-ins may import
_NAMES = {
    "Answer": "PartialResult",
    "Campaign": "EvaluationTask",
    "Clean": "PredictedX0",
    "Question": "EstimationTask",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of `_MOVED` as the one in its place, with a `DeprecationWarning`."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        known = fullname in _MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if known else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Everything that the module in its place has."""
        now = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is {now} since 0.2.0", DeprecationWarning, stacklevel=2)
        held = vars(importlib.import_module(now))
        vars(module).update({k: v for k, v in held.items() if not k.startswith("__")})
        vars(module).update({old: held[new] for old, new in _NAMES.items() if new in held})


sys.meta_path.append(_MovedModules())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("qsearch-diffusion")
    if name in _RENAMED:
        now = _RENAMED[name]
        warnings.warn(
            f"qsearch.{name} is qsearch.{now} since 0.2.0", DeprecationWarning, stacklevel=2
        )
        name = now
    if name not in _CONTENTS:
        raise AttributeError(f"module 'qsearch' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_CONTENTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
