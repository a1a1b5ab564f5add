"""The kinds of choices that go through every verb, each as a plan of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qsearch.core import plugins
from qsearch.core.format_words import FormatWord
from qsearch.core.graph import LayerSpec, OpGraph

#: what layers have that a kind is not for
REST = "int8-c"
Serves = Callable[[LayerSpec], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of choice.

    Attributes:
        choices: one scheme, or one for each range of steps, of the layers that `serves` names.
        serves: for which layers it is made; all that can be quantized when left out.
        sites: pattern of an attention's tensors, or attentions -> what is done there.
    """

    choices: tuple[str, ...]
    serves: Serves = lambda layer: True
    sites: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def ranges(self) -> int:
        """Ranges of sampler steps."""
        return max(len(self.choices), *(len(held) for _, held in self.sites), 1)

    def layers(self, graph: OpGraph) -> dict[str, str | list[str]]:
        """Layer -> what a plan by hand says of it."""
        own = self.choices[0] if len(self.choices) == 1 else list(self.choices)
        found = {x.name: own if self.serves(x) else REST for x in graph.quantizable}
        assert own in found.values(), "the tiny model has no layer for it"
        return found

    def schemes(self) -> list[str]:
        """The schemes of layers that it speaks of."""
        return list(dict.fromkeys(self.choices))


def linear(layer: LayerSpec) -> bool:
    return layer.kind == "linear"


def wide(layer: LayerSpec) -> bool:
    """A linear layer whose rows and columns tiles, ranks and Hadamard matrices divide."""
    return layer.kind == "linear" and all(n >= 16 and n % 16 == 0 for n in layer.weight_shape)


def few(layer: LayerSpec) -> bool:
    return layer.name.endswith("attn1.to_q")


def text(layer: LayerSpec) -> bool:
    return ".attn2.to_k" in layer.name or ".attn2.to_v" in layer.name


#: transform -> (its scheme, the layers that it is for)
TRANSFORMS: dict[str, tuple[str, Serves]] = {
    "balance": ("uint4-c+a8~balance50", linear),
    "bos": ("uint4-c+a8t~bos", text),
    "lowrank": ("uint4-c+a8~lowrank16", wide),
    "migrate": ("uint4-c+a8t~migrate", linear),
    "rotate": ("uint4-c+a8~rotate", wide),
    "shift": ("uint4-c+a8t~shift", linear),
}


def formats() -> dict[str, Kind]:
    """A kind for each format of a weight that there is."""
    made = {}
    for name in plugins.names("formats", outside=False):
        module: FormatWord = plugins.load("formats", name)
        word = next((w for w in module.words if module.bits(w) == 4), module.words[0])
        size = "-c" if "c" in module.sizes else ""
        made[f"format {name}"] = Kind((word + size,), wide if name == "trellis" else _any)
    return made


def _any(layer: LayerSpec) -> bool:
    return True


KINDS: dict[str, Kind] = {
    **formats(),
    "groups": Kind(("int4-g8",)),
    "calibrated": Kind(("uint4-c@gptq",), linear),
    "learnt": Kind(("uint4-c@adaround",), few),
    "dynamic input": Kind(("uint4-c+a8",)),
    "static input": Kind(("uint4-c+a8t",)),
    "input alone": Kind(("keep+a8",)),
    "symmetric input": Kind(
        ("int8-c+aint8",), few
    ),  # in all layers a code at a tie falls either way
    "input in groups": Kind(("int4-g8+aint4g8",)),
    "input in blocks": Kind(("nvfp4+anvfp4",)),
    **{f"transform {name}": Kind((scheme,), to) for name, (scheme, to) in TRANSFORMS.items()},
    "attention tensors": Kind(("uint4-c",), sites=(("*attn1:softmax", ("keep+a8",)),)),
    "whole attention": Kind(("uint4-c",), sites=(("*attn1:attention", ("window2~rettention",)),)),
    "ranges of inputs": Kind(("uint4-c+a8", "uint4-c+a4")),
    "ranges of weights": Kind(("uint4-c", "int8-c")),
    "ranges of static inputs": Kind(("uint4-c+a8t", "uint4-c+a4t")),
    "ranges of a smoothed input": Kind(("uint4-c+a8~balance50", "uint4-c+a4"), linear),
    "ranges of attention tensors": Kind(
        ("uint4-c",), sites=(("*attn1:softmax", ("keep+a8", "keep+a4")),)
    ),
}

#: kinds that go through every verb in the quick suite; all go through `apply`, the others through
#: the rest where `slow` tests run
QUICK = ("dynamic input", "whole attention", "ranges of inputs", "ranges of attention tensors")
