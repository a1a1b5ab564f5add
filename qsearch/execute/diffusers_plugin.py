"""A diffusers quantizer: `from_pretrained(..., quantization_config=QSearchConfig("plan.json"))` packs each weight as it is read.

Full precision is never whole in memory: a weight's codes are made when diffusers hands it over, and the layer that held it gives way to a packed one.
`save_pretrained` writes the packed tensors with the plan in config.json; they load again without being quantized again. diffusers has no
registration for quantizers, so that importing this module (`import qsearch.diffusers`) adds ours to its two tables, as sdnq does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..core.errors import QSearchError, nearest
from ..core.graph import OpGraph
from ..core.plan import BitPlan
from ..core.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor, nn


class QSearchMethod(StrEnum):
    """What diffusers writes as `quant_method`; it reads `.value`."""

    QSEARCH = "qsearch"


class QSearchConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers is not followed by the type checker
    """A plan for diffusers: that of a plan.json, whose graph.json lies beside it (or is given as `graph`).

    `layers`, `splits`, `axes`: the same as plain data, as config.json keeps it: layer -> scheme, channels of the parts of a concatenated
    input, axis of the output channels where it is not the first. Raises `QSearchError` for a broken plan, and for schemes that want calibration.
    """

    def __init__(
        self,
        plan: str | Path | BitPlan | None = None,
        graph: str | Path | OpGraph | None = None,
        *,
        layers: Mapping[str, str] | None = None,
        splits: Mapping[str, Sequence[int]] | None = None,
        axes: Mapping[str, int] | None = None,
        quant_method: str = "qsearch",
    ) -> None:
        self.quant_method = QSearchMethod(quant_method)
        if (plan is None) == (layers is None):
            raise QSearchError(
                'QSearchConfig takes a plan, as in QSearchConfig("runs/mine/plan.json"), or its layers as config.json keeps them'
            )
        if plan is not None:
            layers, splits, axes = _plain(plan, graph)
        self.layers = _texts(layers)
        self.splits = {str(name): [int(n) for n in part] for name, part in (splits or {}).items()}
        self.axes = {str(name): int(axis) for name, axis in (axes or {}).items()}

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The layers that are not kept."""
        return {
            name: scheme
            for name, text in self.layers.items()
            if (scheme := Scheme.parse(text)) != Scheme("keep")
        }

    def to_dict(self) -> dict[str, Any]:
        """What config.json keeps."""
        return {
            "quant_method": self.quant_method.value,
            "layers": self.layers,
            "splits": self.splits,
            "axes": self.axes,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: what diffusers prints."""
        return self.to_dict()


def _plain(
    plan: str | Path | BitPlan, graph: str | Path | OpGraph | None
) -> tuple[dict[str, str], dict[str, Sequence[int]], dict[str, int]]:
    if not isinstance(graph, OpGraph):
        if graph is None and isinstance(plan, BitPlan):
            raise QSearchError("a plan from Python needs its graph: QSearchConfig(plan, graph)")
        graph = OpGraph.load(
            Path(graph) if graph is not None else Path(str(plan)).parent / "graph.json"
        )
    made = plan if isinstance(plan, BitPlan) else BitPlan.load(Path(plan), graph)
    if made.graph != graph.id:
        raise QSearchError(
            f"the plan was made for graph {made.graph}, {graph.model} is graph {graph.id}; make a plan for this model"
        )
    splits: dict[str, Sequence[int]] = {
        layer.name: list(layer.parts) for layer in graph if layer.parts
    }
    return (
        {name: str(s) for name, s in made.layers.items()},
        splits,
        {layer.name: layer.channel_axis for layer in graph if layer.channel_axis},
    )


def _texts(layers: Any) -> dict[str, str]:
    if not isinstance(layers, Mapping) or not all(isinstance(name, str) for name in layers):
        raise QSearchError(
            f"the layers of a plan are names with schemes; given {str(layers)[:80]!r}"
        )
    return {name: str(Scheme.parse(text)) for name, text in layers.items()}


class QSearchQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # as above
    """Packs weights as they come, or takes packed ones as they are."""

    requires_calibration = False
    required_packages = None
    use_keep_in_fp32_modules = False

    def __init__(self, quantization_config: QSearchConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config, self.schemes = quantization_config, quantization_config.schemes

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
                    f"{type(model).__name__} has no layer {name!r} with a weight{nearest(name, known)}; is the plan of another model?"
                )
        if self.pre_quantized:
            place_empty(model, self.schemes, self.config.axes, self.config.splits)
        else:
            for name, scheme in self.schemes.items():
                _refuse_data(name, scheme)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether a tensor of the checkpoint is a weight to be packed, or a part of one that is packed already."""
        if self.pre_quantized:
            return (
                param_name.partition(".parts.")[0] in self.schemes
                or param_name.partition(".input.")[0] in self.schemes
            )
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.schemes

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
        """Pack one weight, or put one packed tensor in its place. What diffusers cast to the model's type is taken again as it was stored."""
        stored, device = (
            state_dict[param_name],
            target_device if target_device is not None else "cpu",
        )
        if self.pre_quantized:
            place, _, name = param_name.rpartition(".")
            _put(model.get_submodule(place), name, stored.to(device))
        else:
            self._pack(model, param_name.removesuffix(".weight"), stored, param_value.to(device))

    def _pack(self, model: nn.Module, name: str, stored: Tensor, cast: Tensor) -> None:
        from torch import nn

        from ..measure.quantization import quantize_parts
        from .packing import PackedWeight
        from .runtime import place_empty

        scheme, axis, splits = (
            self.schemes[name],
            self.config.axes.get(name, 0),
            self.config.splits.get(name, []),
        )
        if scheme.format == "keep":  # its input alone is rounded
            model.get_submodule(name).weight = nn.Parameter(cast, requires_grad=False)
        place_empty(model, {name: scheme}, {name: axis}, {name: splits}, cast.device)
        if scheme.format != "keep":
            parts: Any = model.get_submodule(name).parts
            for i, made in enumerate(
                quantize_parts(
                    stored.to(cast.device), scheme.weight_only, axis=axis, splits=splits, layer=name
                )
            ):
                parts[i] = PackedWeight.of(made)

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


def _refuse_data(name: str, scheme: Scheme) -> None:
    """Refuse a scheme that wants to see inputs: there are none while a model is loaded."""
    from ..measure.quantization import method_of

    static = bool(scheme.activation) and scheme.grain != "token"
    if scheme.transforms or static or (scheme.format != "keep" and method_of(scheme).needs_inputs):
        raise QSearchError(
            f"{name} has {scheme}, which looks at the layer's inputs, and there are none while a model is loaded; apply the plan with `qsearch apply`"
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
