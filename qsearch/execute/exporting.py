"""What an exporter provides, and what it is given: a plan, its graph, and where the weights lie.

A file tells which format each layer has, not by which method its scales were found: `read` gives
schemes without `@METHOD`, and a plan equals what is read back when it does so without its methods
(`formats` below). Exporters that write weights write the codes that the plan's own methods find
(`codes.py`), so that the tool computes with exactly what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..core.graph import LayerSpec, OpGraph
from ..core.plan import Plan
from ..core.scheme import Scheme
from ..measure.shards import Weights, key

if TYPE_CHECKING:
    from ..choices.statistics import LayerInputs


@dataclass(frozen=True)
class Export:
    """A plan on its way out. `source`: the diffusers folder of the pipeline that it was made for;
    `component`: the denoiser's folder in it.

    `calibration`: what goes into the layers, for methods that go by it. `steps`: the plan over
    ranges of sampler steps, of which `plan` is the one in the middle, for tools that switch between
    them; `sampler_steps`: how many steps these are. `variant`: of the weight files (fp16).
    """

    plan: Plan
    graph: OpGraph
    source: Path
    component: str = "transformer"
    calibration: Mapping[str, LayerInputs] = field(default_factory=dict)
    steps: Plan | None = None
    sampler_steps: int = 20
    same: Mapping[str, str] = field(default_factory=dict)
    variant: str | None = None

    @property
    def weights(self) -> Weights:
        """The tensors of the component, under every name that a layer has."""
        return Weights(self.source / self.component, self.same, self.variant)


class AbstractExporter(Protocol):
    """What a module in `exporters/` provides. Its contract is
    `qsearch.testing.ExporterContract`.
    """

    #: pip's names of the packages without which `write` can't work
    needs: tuple[str, ...]
    #: whether the files hold weights (else only a configuration that the tool quantizes by)
    writes_weights: bool
    #: whether the tool's checkpoints hold queries, keys and values as one weight, so that these
    #: share a scheme
    fuses: bool
    #: whether the files can say that sampler steps differ
    has_steps: bool
    #: kinds of components that the tool loads from such files, of `core.components.kind`; may be
    #: left out: see `takes`. `either`, `transforms`, `loading`, `stores_range(scheme)` and
    #: `tied(graph)` may be left out, too: see below.
    takes: tuple[str, ...]

    def nearest(self, scheme: Scheme, layer: LayerSpec) -> Scheme:
        """The scheme that the tool carries out for this layer: `scheme` itself where it has it,
        else the nearest it has (`keep` at last).

        Args:
            scheme: as the plan has it.
            layer: with its shape and kind.

        Returns:
            A scheme that a file of the tool can hold.
        """
        ...

    def write(self, job: Export, folder: Path) -> list[Path]:
        """Write what the tool loads into an empty `folder`; every scheme of the plan is one that
        `nearest` leaves alone. Returns the files.

        Args:
            job: the model, its weights, the plan and the graph.
            folder: where the files go.

        Returns:
            Paths of the files.
        """
        ...

    def read(self, folder: Path, graph: OpGraph) -> dict[str, Scheme]:
        """layer -> scheme (of every layer of the graph, without methods) as the files say.

        Args:
            folder: with the files that `write` wrote.
            graph: of the model.

        Returns:
            A scheme for each layer.

        Raises:
            QSearchError: the graph lacks a layer of the files, which the message names, or the
                files are not whole.
        """
        ...


def stores_range(exporter: AbstractExporter, scheme: Scheme) -> bool:
    """Whether a layer of that scheme has a range of its input in the tool's file, which calibration
    measures: static schemes, and those that an exporter's `stores_range` names besides.

    Args:
        exporter: the plug-in.
        scheme: of a layer.

    Returns:
        Whether a range is measured.
    """
    own = getattr(exporter, "stores_range", None)
    return scheme.static_input or (own is not None and own(scheme))


def takes(exporter: AbstractExporter) -> tuple[str, ...]:
    """The kinds of components that a tool takes; denoisers alone where its plug-in does not say.

    Args:
        exporter: the plug-in.

    Returns:
        E.g. `("denoiser",)`.
    """
    return tuple(getattr(exporter, "takes", ("denoiser",)))


def either(exporter: AbstractExporter) -> tuple[str, ...]:
    """Formats of which a file of the tool has one at most: those that an exporter's `either` names.

    Args:
        exporter: the plug-in.

    Returns:
        Words of formats; empty for most tools.
    """
    return tuple(getattr(exporter, "either", ()))


def transforms(exporter: AbstractExporter) -> tuple[str, ...]:
    """Transforms that a tool takes with some of its schemes, as lists of schemes show them: those
    that an exporter's `transforms` spells, e.g. `~rotate`.

    Args:
        exporter: the plug-in.

    Returns:
        The words; none where the plug-in does not say.
    """
    return tuple(getattr(exporter, "transforms", ()))


def loading(exporter: AbstractExporter, kind: str, repository: str) -> str:
    """Python that loads a denoiser of the class `kind` from a repository of the hub: an exporter's
    `loading`, in which {kind} and {repository} stand for these.

    Args:
        exporter: the plug-in.
        kind: the class, of diffusers.
        repository: OWNER/NAME.

    Returns:
        The code; "" where the plug-in has none.
    """
    code: str = getattr(exporter, "loading", "")
    return code.strip().replace("{kind}", kind).replace("{repository}", repository)


def tied(exporter: AbstractExporter, graph: OpGraph) -> Sequence[Sequence[str]]:
    """Groups of layers that a tool stores as one weight besides queries, keys and values: those
    that an exporter's `tied` names.

    Args:
        exporter: the plug-in.
        graph: of the model.

    Returns:
        Groups of layer names.
    """
    own = getattr(exporter, "tied", None)
    found: Sequence[Sequence[str]] = () if own is None else own(graph)
    return found


def every_name(plan: Plan, graph: OpGraph) -> tuple[Plan, OpGraph, dict[str, str]]:
    """The plan and the graph with a layer for each name that a weight has, since tools go by names;
    and tensor -> its other name.

    A module with two names gets its scheme under both; another module with the same weight gets the
    weight's part of it alone, as in `simulate`.

    Args:
        plan: the plan.
        graph: of the model.

    Returns:
        (plan, graph, tensor -> its other name).
    """
    layers: list[LayerSpec] = []
    choices, same = dict(plan.single), dict[str, str]()
    for layer in graph:
        layers.append(replace(layer, aliases=(), shared=()))
        for alias in layer.aliases:
            layers.append(replace(layers[-1], name=alias))
            scheme, first = choices[layer.name], layers[-1]
            choices[alias] = scheme if alias in layer.shared else scheme.weight_only
            same[key(first)] = key(layer)
            if alias in layer.shared and layer.bias:
                same[f"{alias}.bias"] = f"{layer.name}.bias"
    if not same:
        return plan, graph, same
    whole = replace(graph, layers=tuple(layers), header=None)
    return Plan.make(whole, choices, solver=plan.solver), whole, same


def formats(layers: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes without their methods, which leave no trace in a file.

    Args:
        layers: layer -> scheme.

    Returns:
        layer -> scheme.
    """
    return {name: replace(scheme, method="") for name, scheme in layers.items()}
