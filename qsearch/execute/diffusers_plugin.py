"""A diffusers quantizer: `from_pretrained(..., quantization_config=QSearchConfig("plan.json"))`
packs each weight as it is read.

Full precision is never whole in memory: a weight's codes are made when diffusers hands it over, and
the layer that held it gives way to a packed one. `save_pretrained` writes the packed tensors with
the plan in config.json; they load again without being quantized again. diffusers has no
registration for quantizers, so that importing this module (`import qsearch.diffusers`) adds ours to
its two tables, as sdnq does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..core.cost import Choices
from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import Plan, said
from ..core.scheme import KEEP, Scheme
from ..core.steps import StepRanges
from ..graphs.components import part_of

if TYPE_CHECKING:
    from torch import Tensor, nn


class QSearchMethod(StrEnum):
    """What diffusers writes as `quant_method`; it reads `.value`."""

    QSEARCH = "qsearch"


class QSearchConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is not followed by the type checker
    """A plan for diffusers: that of a plan.json, whose graph.json lies beside it (or is given as
    `graph`).

    `component`: which one is loaded, of a plan for several (transformer_2, vae). `layers`, `steps`,
    `splits`, `axes`: the same as plain data, as config.json keeps it: layer -> scheme (or one for
    each range of sampler steps, which `steps` says), channels of the parts of a concatenated input,
    axis of the output channels where it is not the first. Raises `QSearchError` for a broken plan,
    and for schemes that want calibration.
    """

    def __init__(
        self,
        plan: str | Path | Plan | None = None,
        graph: str | Path | OpGraph | None = None,
        *,
        component: str | None = None,
        layers: Mapping[str, str | Sequence[str]] | None = None,
        steps: Mapping[str, Any] | None = None,
        splits: Mapping[str, Sequence[int]] | None = None,
        axes: Mapping[str, int] | None = None,
        quant_method: str = "qsearch",
    ) -> None:
        self.quant_method = QSearchMethod(quant_method)
        if (plan is None) == (layers is None):
            raise QSearchError(
                'QSearchConfig takes a plan, as in QSearchConfig("runs/mine/plan.json"), '
                "or its layers as config.json keeps them"
            )
        if plan is not None:
            layers, steps, splits, axes = _plain(plan, graph, component)
        self.layers, self.steps = _texts(layers), StepRanges.parse(steps)
        self.splits = {str(name): [int(n) for n in part] for name, part in (splits or {}).items()}
        self.axes = {str(name): int(axis) for name, axis in (axes or {}).items()}

    @property
    def choices(self) -> dict[str, Choices]:
        """The layers that are not kept, with one scheme or one for each range of steps."""
        found = {
            name: tuple(map(Scheme.parse, [text] if isinstance(text, str) else text))
            for name, text in self.layers.items()
        }
        return {name: held for name, held in found.items() if held != (KEEP,)}

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        return {
            "quant_method": self.quant_method.value,
            "layers": self.layers,
            "steps": self.steps.content(),
            "splits": self.splits,
            "axes": self.axes,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: what diffusers prints."""
        return self.to_dict()


_Plain = tuple[dict[str, str | list[str]], dict[str, Any], dict[str, Sequence[int]], dict[str, int]]


def _plain(
    plan: str | Path | Plan, graph: str | Path | OpGraph | None, component: str | None
) -> _Plain:
    if not isinstance(graph, OpGraph):
        if graph is None and isinstance(plan, Plan):
            raise QSearchError("a plan from Python needs its graph: QSearchConfig(plan, graph)")
        graph = OpGraph.load(
            Path(graph) if graph is not None else Path(str(plan)).parent / "graph.json"
        )
    made = plan if isinstance(plan, Plan) else Plan.load(Path(plan), graph)
    if made.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {made.graph}, {graph.model} is graph "
            f"{graph.id}; make a plan for this model"
        )
    if graph.components or component is not None:
        if component not in graph.components:
            held = ", ".join(graph.components) or "one denoiser"
            raise QSearchError(
                f"the plan is for {held}, and one model is loaded at a time: say which, as in "
                'QSearchConfig("plan.json", '
                f'component="{(graph.components or ("",))[0]}"); given {component!r}'
            )
        made, graph = part_of(made, graph, component)
    splits: dict[str, Sequence[int]] = {
        layer.name: list(layer.parts) for layer in graph if layer.parts
    }
    if made.sites:
        site = next(iter(made.sites))
        raise QSearchError(
            "weights are packed as they are read, and attention is not changed; the plan "
            f"says {made.text(site)} at {site}: keep it, "
            "or pack with `qsearch apply`"
        )
    choices = dict(made.choices)
    for layer in graph:
        for alias in (name for name in layer.aliases if name not in layer.shared):
            choices[alias] = tuple(scheme.weight_only for scheme in choices[layer.name])
    return (
        said(choices),
        made.steps.content(),
        splits,
        {layer.name: layer.channel_axis for layer in graph if layer.channel_axis},
    )


def _texts(layers: Any) -> dict[str, str | list[str]]:
    if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
        raise QSearchError(
            f"the layers of a plan are names with schemes; given {str(layers)[:80]!r}"
        )
    return {
        name: [str(Scheme.parse(one)) for one in text]
        if isinstance(text, list | tuple)
        else str(Scheme.parse(text))
        for name, text in layers.items()
    }


class QSearchQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # as above
    """Packs weights as they come, or takes packed ones as they are."""

    requires_calibration = False
    required_packages = None
    use_keep_in_fp32_modules = True  # what a class keeps in fp32 stays so, as without a plan

    def __init__(self, quantization_config: QSearchConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config, self.choices = quantization_config, quantization_config.choices

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from .runtime import place_empty

        known = {
            name
            for name, module in model.named_modules()
            if getattr(module, "weight", None) is not None
        }
        for name in self.config.layers:
            if name not in known:
                raise QSearchError(
                    f"{type(model).__name__} has no layer {name!r} with a "
                    f"weight{nearest(name, known)}; is the plan of another model?"
                )
        if self.pre_quantized:
            place_empty(model, self.choices, self.config.axes, self.config.splits)
        else:
            for name, scheme in ((n, s) for n, held in self.choices.items() for s in held):
                _refuse_data(name, scheme)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from .ranged import follow_steps

        follow_steps(model, [model], self.config.steps)
        return model

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether a tensor of the checkpoint is a weight to be packed, or a part of one that is
        packed already.
        """
        from torch import nn

        if self.pre_quantized:
            return any(
                param_name.partition(part)[0] in self.choices
                for part in (".parts.", ".input.", ".ranges.")
            )
        layer, _, name = param_name.rpartition(".")
        if (
            name == "bias"
        ):  # of a layer whose weight came first, and now has a packed layer for each range of steps
            return len(self.choices.get(layer, ())) > 1 and not isinstance(
                model.get_submodule(layer), nn.Linear | nn.modules.conv._ConvNd
            )
        return name == "weight" and layer in self.choices

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Pack one weight, or put one packed tensor in its place. What diffusers cast to the
        model's type is taken again as it was stored.
        """
        stored, device = (
            state_dict[param_name],
            target_device if target_device is not None else "cpu",
        )
        place, _, name = param_name.rpartition(".")
        if self.pre_quantized or name == "bias":
            place = f"{place}.ranges.0" if not self.pre_quantized else place
            _put(model.get_submodule(place), name, stored.to(device))
        else:
            self._pack(model, place, stored, param_value.to(device))

    def _pack(self, model: nn.Module, name: str, stored: Tensor, cast: Tensor) -> None:
        from torch import nn

        from ..choices.input_quantizer import fit_input_quantizer
        from ..choices.packed_weight import packed_weight
        from ..choices.quantization import quantize_parts
        from .ranged import RangedLayer
        from .runtime import place_empty

        choices, axis, splits = (
            self.choices[name],
            self.config.axes.get(name, 0),
            self.config.splits.get(name, []),
        )
        if any(scheme.format == "keep" for scheme in choices):  # its input alone is rounded
            model.get_submodule(name).weight = nn.Parameter(cast, requires_grad=False)
        source = model.get_submodule(name)
        place_empty(model, {name: choices}, {name: axis}, {name: splits}, cast.device)
        placed: Any = model.get_submodule(name)
        ranged = isinstance(placed, RangedLayer)
        for place, layer in enumerate(placed.layers if ranged else [placed]):
            scheme, weight = layer.scheme.weight_only, stored.to(cast.device)
            if layer.scheme.transforms:  # those that need no data: `_refuse_data`
                quantizer = fit_input_quantizer(layer.scheme, weight, source, None, layer=name)
                assert quantizer is not None
                assert layer.input is not None
                layer.input.fill(quantizer, weight, None)
                weight = quantizer.weight(weight.float())
            if scheme.format == "keep" or (ranged and placed.owners[place] != place):
                continue
            made = quantize_parts(weight, scheme, axis=axis, splits=splits, layer=name)
            for i, part in enumerate(made):
                layer.parts[i] = packed_weight(part)
        if ranged:
            placed.share()

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def _refuse_data(name: str, scheme: Scheme) -> None:
    """Refuse a scheme that needs inputs: there are none while a model is loaded."""
    from ..choices.input_quantizer import needs_inputs

    if needs_inputs(scheme):
        raise QSearchError(
            f"{name} has {scheme}, which looks at the layer's inputs, and there are none "
            "while a model is loaded; apply the plan with `qsearch apply`"
        )


def _put(place: nn.Module, name: str, value: Tensor) -> None:
    from torch import nn

    if name in place._parameters:
        place._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        place._buffers[name] = value
    levels = place._buffers.get("levels")
    if levels is not None and levels.device != value.device:
        place._buffers["levels"] = levels.to(value.device)


AUTO_QUANTIZER_MAPPING["qsearch"] = QSearchQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["qsearch"] = QSearchConfig
