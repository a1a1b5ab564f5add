"""Chains of transforms: a branch that reads the unrounded input computes packed what it computes in
simulation, after any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch.choices.contracts import statistics_of
from qsearch.choices.fake_quantization import fake_quantize
from qsearch.choices.input_quantizer import Word, fit_input_quantizer, hook_input
from qsearch.choices.quantization import quantize
from qsearch.choices.transform import AbstractPackedStep, AbstractStep, Product, Site
from qsearch.choices.transforms import balance, migrate, shift
from qsearch.core.scheme import Scheme
from qsearch.core.words import Buffer, Needs, Stage

RANK, CHANNELS, OUTPUTS = 4, 24, 16


@dataclass(frozen=True)
class Branch(AbstractStep):
    """W = L + (W - L): L [outputs, channels] of rank `RANK` meets the input before it is
    rounded.
    """

    down: Tensor
    up: Tensor
    adds_output: ClassVar[bool] = True
    reads_input: ClassVar[bool] = True

    def weight(self, weight: Tensor) -> Tensor:
        return weight - self.up @ self.down

    def restore_weight(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down

    def output(self, y: Tensor, product: Product) -> Tensor:
        assert product.x is not None and product.rounded is not None
        return y + F.linear(F.linear(product.x - product.rounded, self.down), self.up)

    def pack(self, product: Product) -> tuple[dict[str, Tensor], Tensor | None]:
        return {"down": self.down, "up": self.up}, product.bias


@dataclass(frozen=True)
class PackedBranch(AbstractPackedStep):
    down: Tensor
    up: Tensor

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return y + F.linear(F.linear(x, self.down), self.up)


def fit_branch(site: Site) -> Branch:
    left, size, right = torch.linalg.svd(site.weight[:, :, 0], full_matrices=False)
    return Branch(right[:RANK], left[:, :RANK] * size[:RANK])


def stored_branch(shape: Sequence[int], axis: int, number: int) -> Mapping[str, Buffer]:
    return {"down": Buffer((RANK, shape[1 - axis])), "up": Buffer((shape[axis], RANK))}


BRANCH: Any = SimpleNamespace(
    stage=Stage.LOW_RANK,
    number=None,
    scales_weight=True,
    unseen="a branch that meets the unrounded input",
    needs=Needs.NOTHING,
    needs_linear=True,
    adds_bias=False,
    stored=stored_branch,
    fit=fit_branch,
    unpack=lambda stored, *_: PackedBranch(**stored),
)
WORDS: dict[str, Any] = {"balance": balance, "shift": shift, "migrate": migrate, "branch": BRANCH}


def layer() -> tuple[nn.Linear, Tensor]:
    """A layer, and inputs of which a channel in six is large and all are off centre."""
    dice = torch.Generator().manual_seed(0)
    module = nn.Linear(CHANNELS, OUTPUTS).requires_grad_(False)
    nn.init.normal_(module.weight, std=0.2, generator=dice)
    large = torch.where(torch.arange(CHANNELS) % 6 == 0, 6.0, 0.5)
    return module, torch.randn(5, 7, CHANNELS, generator=dice) * large + large


CHAINS = [
    ("branch",),
    ("balance", "branch"),
    ("shift", "branch"),
    ("balance", "shift", "branch"),
    ("shift", "migrate", "branch"),
    ("balance", "shift", "migrate"),
]


@pytest.mark.parametrize("names", CHAINS, ids="~".join)
@pytest.mark.parametrize("form", ["uint4-c+a4", "uint4-c+a4t", "uint3-g8+a6c"])
def test_a_chain_computes_packed_what_it_computes_in_simulation(
    names: tuple[str, ...], form: str
) -> None:
    module, x = layer()
    scheme, full, bias = Scheme.parse(form), module.weight.data.clone(), module.bias
    words = [Word(n, WORDS[n], 50 if n == "balance" else 0) for n in names]
    found = fit_input_quantizer(scheme, full, module, statistics_of(x), layer="layer", words=words)
    assert found is not None
    codes = quantize(found.weight(full), scheme).dequantize()
    simulated = found.restore_weight(codes)

    module.weight.data = simulated
    handles = hook_input(module, lambda: (found, full, simulated))
    made = module(x)
    for handle in handles:
        handle.remove()

    stored, packed_bias = found.pack(full, bias)
    steps, inputs, own = [], [], x
    for word, held in zip(words, stored, strict=True):
        steps.append(word.plugin.unpack(held, full.shape, 0, word.number))
        inputs.append(own)
        own = steps[-1].input(own, -1)
    y = F.linear(fake_quantize(own, scheme, found.inputs, -1), codes, packed_bias)
    for step, given in reversed(list(zip(steps, inputs, strict=True))):
        y = step.output(y, given)
    torch.testing.assert_close(made, y, rtol=1e-3, atol=1e-3)


def test_a_branch_that_is_not_rounded_lowers_the_error_of_low_bits() -> None:
    module, x = layer()
    scheme, full, errors = Scheme.parse("uint3-c+a4"), module.weight.data.clone(), []
    truth = module(x)
    for words in ((), (Word("branch", BRANCH),)):
        found = fit_input_quantizer(scheme, full, module, None, layer="layer", words=words)
        assert found is not None
        weight = found.restore_weight(quantize(found.weight(full), scheme).dequantize())
        rounded = found.fake_quantize(x)
        product = Product(full, weight, module.bias, x, rounded)
        y = found.output(F.linear(rounded, weight, module.bias), product)
        errors.append(float((y - truth).square().sum()))

    assert errors[1] < 0.8 * errors[0]


def test_gradients_go_straight_through_a_rounded_input() -> None:
    module, x = layer()
    found = fit_input_quantizer(Scheme.parse("keep+a4"), module.weight, module, None, layer="x")
    handles = hook_input(module, lambda: (found, module.weight, module.weight))
    x.requires_grad_()

    module(x).sum().backward()

    for handle in handles:
        handle.remove()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)
