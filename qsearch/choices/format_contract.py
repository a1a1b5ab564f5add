"""The contract of formats: words that the grammar reads, a price, codes, and a packed form that
stands for the same weight.
"""

from __future__ import annotations

import itertools
import re

import torch
from torch import Tensor

from ..core.contract import Contract
from ..core.format_words import formats
from ..core.scheme import Scheme
from .packed_weight import AbstractPackedWeight, packed_weight
from .quantization import Quantized, quantize


class FormatContract(Contract):
    """What holds for every file in `formats/`, on each of its words, per tensor, channel and group
    as it allows.
    """

    kind = "formats"
    #: [rows, columns] of the weight that is tried, which groups don't divide
    shape = (20, 44)

    def schemes(self) -> list[Scheme]:
        """Every word with every granularity."""
        ends = [{"t": "-t", "c": "-c", "g": "-g16"}[size] for size in self.module.sizes] or [""]
        return [
            Scheme.parse(word + end) for word, end in itertools.product(self.module.words, ends)
        ]

    def _weight(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))

    def _packed(self, made: Quantized) -> AbstractPackedWeight | None:
        rows, columns = made.shape
        device = torch.device("cpu")
        if self.module.packed(made.scheme, rows, columns, device) is None:
            return None
        return packed_weight(made)

    def test_its_words_are_its_own_and_are_read_as_they_are_written(self) -> None:
        """Small letters and digits; no other format has the word."""
        known = formats()
        for word in self.module.words:
            assert re.fullmatch(r"[a-z][a-z0-9]*", word), word
            assert known.count(word) == 1, f"{word} is spelt by {known.count(word)} formats"
        for scheme in self.schemes():
            assert str(Scheme.parse(str(scheme))) == str(scheme)
            assert scheme.family == self.module.family

    def test_it_declares_how_it_works(self) -> None:
        """What grammar, costs and methods ask of it."""
        assert set(self.module.sizes) <= set("tcg")
        assert self.module.multiplied_as in ("", "int", "float")
        for name in ("stores_zero", "follows_range", "has_grid"):
            assert getattr(self.module, name) in (True, False), name
        for form in self.module.inputs.values():
            assert self.module.bits(form) > 0, form

    def test_codes_are_near_the_weight_and_zeros_stay_zeros(self) -> None:
        """Rounding costs less than leaving the weight out; rows of zeros, one constant, tiny and
        huge rows stay finite.
        """
        weight = self._weight()
        for scheme in self.schemes():
            off = quantize(weight, scheme).dequantize() - weight
            assert float(off.square().sum()) < float(weight.square().sum()), str(scheme)
            for size in (0.0, 0.7, -0.3, 1e-9, 3e4):
                back = quantize(torch.full(self.shape, size), scheme).dequantize()
                assert bool(torch.isfinite(back).all()), f"{scheme} at {size}"
                assert size != 0 or float(back.abs().max()) == 0.0, f"{scheme}: zeros moved"

    def test_it_is_deterministic(self) -> None:
        """Twice the same weights, twice the same values."""
        for scheme in self.schemes():
            first, second = (quantize(self._weight(), scheme).dequantize() for _ in range(2))
            assert torch.equal(first, second), str(scheme)

    def test_a_packed_weight_stands_for_the_same_weight_at_the_bits_of_the_plan(self) -> None:
        """Its bytes are the stored bits, but for rows that are filled up to whole bytes; products
        are those of the values.
        """
        weight = self._weight()
        x = torch.randn(3, self.shape[1], generator=torch.Generator().manual_seed(1))
        for scheme in self.schemes():
            made = quantize(weight, scheme)
            packed = self._packed(made)
            if packed is None:
                continue
            values = made.dequantize()
            torch.testing.assert_close(packed.dequantize(), values, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(packed.linear(x, None), x @ values.T, rtol=1e-3, atol=1e-3)
            spare = 8 * packed.stored_bytes - scheme.stored_bits(self.shape)
            assert 0 <= spare < 8 * scheme.bits * self.shape[0], f"{scheme}: {spare} bits more"
