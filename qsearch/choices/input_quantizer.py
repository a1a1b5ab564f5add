"""InputQuantizer: what a scheme does to a layer's input: transforms, then fake quantization, in the
layer's own coordinates.

The transforms of a scheme form a chain: each is fitted to what the ones before it left of weight
and inputs (`transform.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core import plugins
from ..core.attention_words import attention_word
from ..core.errors import QSearchError
from ..core.scheme import Scheme
from ..core.words import Needs, number_of, split_word
from .fake_quantization import fake_quantize, straight_through
from .quantization import method_of
from .statistics import LayerInputs
from .transform import AbstractStep, AbstractTransform, Product, Site

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Word:
    """A transform of a scheme: its name, its plug-in, and its number."""

    name: str
    plugin: AbstractTransform
    number: int = 0


def words_of(scheme: Scheme) -> tuple[Word, ...]:
    """The transforms of a scheme, in order."""
    names = [(split_word(word)[0], number_of(word)) for word in scheme.transforms]
    return tuple(Word(name, plugins.load("transforms", name), number) for name, number in names)


@dataclass(frozen=True)
class InputQuantizer:
    """A layer's input under `scheme`.

    Attributes:
        scheme: the layer's scheme.
        steps: its fitted transforms, in order.
        inputs: statistics of what the steps make of the input, for static ranges; None without
            calibration.
        channel: axis of the input's channels, -1 or 1.
    """

    scheme: Scheme
    steps: tuple[AbstractStep, ...]
    inputs: LayerInputs | None
    channel: int

    @property
    def reads_input(self) -> bool:
        """Whether `output` needs the input."""
        return any(step.reads_input for step in self.steps)

    def fake_quantize(self, x: Tensor, rounding: Rounding | None = None) -> Tensor:
        """The layer's input as it is after rounding, in its own coordinates and type; `rounding`:
        in place of the scheme's.
        """
        if not self.scheme.activation:
            return x
        inner = x.float()
        for step in self.steps:
            inner = step.input(inner, self.channel)
        if rounding is None:
            inner = fake_quantize(inner, self.scheme, self.inputs, self.channel)
        else:
            inner = rounding(inner)
        for step in reversed(self.steps):
            inner = step.restore(inner, self.channel)
        return inner.to(x.dtype)

    def effective(self, x: Tensor) -> Tensor:
        """`fake_quantize(x)`, and x itself where the output does not depend on its rounding: what a
        gradient should meet.
        """
        rounded = self.fake_quantize(x)
        for step in self.steps:
            rounded = step.effective(x, rounded)
        return rounded

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [outputs, inputs, ...] as it is stored."""
        for step in self.steps:
            weight = step.weight(weight)
        return weight

    def restore_weight(self, weight: Tensor) -> Tensor:
        """A stored weight in the layer's own coordinates."""
        for step in reversed(self.steps):
            weight = step.restore_weight(weight)
        return weight

    def output(self, y: Tensor, product: Product) -> Tensor:
        """The layer's output with what the steps add, where `y` is what its simulated weight and
        rounded input give.
        """
        for i in reversed(range(len(self.steps))):
            if self.steps[i].adds_output:
                y = self.steps[i].output(y, self._seen_by(i, product))
        return y

    def pack(
        self, full: Tensor, bias: Tensor | None
    ) -> tuple[list[dict[str, Tensor]], Tensor | None]:
        """What each step stores in a packed layer, and the layer's new bias."""
        stored = []
        for i, step in enumerate(self.steps):
            held, bias = step.pack(self._seen_by(i, Product(full, full, bias)))
            stored.append(held)
        return stored, bias

    def _seen_by(self, place: int, product: Product) -> Product:
        """A product in the coordinates in which the input of a step lies."""
        full, weight, x, rounded = product.full, product.weight, product.x, product.rounded
        for step in self.steps[:place]:
            full, weight = step.weight(full), step.weight(weight)
            x = None if x is None else step.input(x, self.channel)
            rounded = None if rounded is None else step.input(rounded, self.channel)
        return Product(full, weight, product.bias, x, rounded)


def needs_inputs(scheme: Scheme) -> bool:
    """Whether carrying out a scheme takes calibration: for its method, for static ranges, for a
    transform, or for an attention.
    """
    if scheme.attention:
        return attention_word(scheme.attention).fitted(scheme.attention)
    return (
        any(word.plugin.needs for word in words_of(scheme))
        or scheme.static_input
        or (scheme.format != "keep" and method_of(scheme).needs_inputs)
    )


def needs_moments(scheme: Scheme) -> bool:
    """Whether calibration must record second moments of the inputs for it."""
    return any(word.plugin.needs >= Needs.MOMENTS for word in words_of(scheme)) or (
        scheme.format != "keep" and method_of(scheme).needs_inputs
    )


def fit_input_quantizer(
    scheme: Scheme,
    weight: Tensor,
    module: nn.Module,
    inputs: LayerInputs | None,
    *,
    layer: str,
    words: Sequence[Word] | None = None,
) -> InputQuantizer | None:
    """What `scheme` does to the input of `module`, or None where it does nothing.

    Args:
        scheme: the scheme.
        weight: the layer's weight in full precision.
        module: the layer.
        inputs: calibration statistics of its inputs.
        layer: its name, for errors.
        words: the transforms, where they are not those that the scheme names.

    Raises:
        QSearchError: calibration is needed and missing, or the layer is none that a transform is
            made for.
    """
    chosen = words_of(scheme) if words is None else tuple(words)
    if not scheme.activation and not chosen:
        return None
    if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        raise QSearchError(
            f"inputs are rounded for linear layers and convolutions; {layer} is "
            f"{type(module).__name__}, give it weights only"
        )
    linear = isinstance(module, nn.Linear)
    plain = isinstance(module, nn.Linear) or not (module.transposed or module.groups > 1)
    for word in chosen:
        if not plain or (word.plugin.needs_linear and not linear):
            suited = (
                "linear layers"
                if word.plugin.needs_linear
                else "linear layers and convolutions in one group"
            )
            raise QSearchError(f"~{word.name} is for {suited}; {layer} is {type(module).__name__}")
    if inputs is None and (any(word.plugin.needs for word in chosen) or scheme.static_input):
        raise QSearchError(
            f"{scheme} needs to know the inputs of {layer}; give QuantizedWeights(model, "
            "graph, calibrate(model, graph, calls))"
        )
    steps: list[AbstractStep] = []
    moved = weight.float()
    bias = bias_of(module)
    for word in chosen:
        rows = moved[:, :, None] if linear else moved.flatten(2)
        try:
            step = word.plugin.fit(Site(rows, bias, scheme, word.number, inputs))
        except QSearchError as error:
            raise QSearchError(f"{layer} can't have {scheme}: {error}") from error
        steps.append(step)
        moved = step.weight(moved)
        inputs = None if inputs is None else step.statistics(inputs)
    return InputQuantizer(scheme, tuple(steps), inputs, -1 if linear else 1)


def hook_input(
    module: nn.Module, now: Callable[[], tuple[InputQuantizer | None, Tensor, Tensor]]
) -> list[RemovableHandle]:
    """Hooks that round the module's input, straight through for gradients, and add to its output
    what its steps add.

    Args:
        module: the layer.
        now: gives, at each call, the input quantizer (None: the input is left alone), the weight in
            full precision, and the weight as it is simulated.

    Returns:
        The hooks, to be removed.
    """
    held: list[tuple[Tensor, Tensor]] = []

    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        quantizer = now()[0]
        if quantizer is None:
            return args, kwargs

        def rounded(x: Tensor) -> Tensor:
            made = straight_through(x, quantizer.fake_quantize)
            if quantizer.reads_input:
                held[:] = [(x, made)]
            return made

        return with_first(rounded, args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        quantizer, full, weight = now()
        if quantizer is None:
            return y
        x, rounded = held.pop() if held else (None, None)
        return quantizer.output(y, Product(full, weight, bias_of(module), x, rounded))

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear layer or convolution."""
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    bias: Tensor | None = module.bias
    return bias


def with_first(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call whose first tensor went through `function`, whether it was given by place
    or by name.
    """
    if args:
        return (function(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return (), {**kwargs, name: function(kwargs[name])}
