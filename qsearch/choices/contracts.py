"""Contracts of quantizers, activations and transforms, and the guard that a runner steps by as many
bits as it is told.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import plugins
from ..core.contract import Contract
from ..core.errors import QSearchError
from ..core.format_words import format_word, formats
from ..core.scheme import Scheme
from .codes import Codes
from .fake_quantization import fake_quantize_between
from .input_quantizer import Word, fit_input_quantizer
from .moments import columns_of, output_error
from .quantization import quantize, to_groups
from .statistics import LayerInputs
from .transform import Product

#: what plug-ins that learn are tried on
_FEW = ("int4-c", "uint2-g8", "uint4-g8", "uint4-t", "e2m1-c")


class QuantizerContract(Contract):
    """What holds for every file in `quantizers/`, on each format it supports, per tensor, channel
    and group.
    """

    kind = "quantizers"

    def schemes(self) -> list[Scheme]:
        """Every format and granularity that the plug-in says it supports; a few where it learns,
        which takes time.
        """
        out = []
        for form in formats()[1:]:
            word = format_word(form)
            assert word is not None
            for end in [{"t": "-t", "c": "-c", "g": "-g8"}[size] for size in word.sizes] or [""]:
                if self.module.needs_inputs and form + end not in _FEW:
                    continue
                scheme = Scheme.parse(form + end)
                if self.module.supports(scheme):
                    out.append(scheme)
        return out

    def _weight(self, seed: int = 0) -> Tensor:
        return torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))

    def _moments(self, columns: int) -> Tensor:
        """Of inputs whose channels hang together and differ in size."""
        dice = torch.Generator().manual_seed(1)
        mix = torch.eye(columns) + torch.randn(columns, columns, generator=dice) / columns**0.5
        rows = torch.randn(256, columns, generator=dice) @ mix * torch.linspace(0.5, 2, columns)
        square: Tensor = rows.T @ rows
        return square / len(rows)

    def _made(self, weight: Tensor, scheme: Scheme, module: Any = None) -> tuple[Tensor, Codes]:
        """(groups, what the plug-in makes of them)."""
        module, groups = module or self.module, to_groups(weight, scheme)
        return groups, module.quantize(
            groups, scheme, *((self._moments(weight.shape[1]),) if module.needs_inputs else ())
        )

    def _error(self, weight: Tensor, scheme: Scheme, module: Any = None) -> float:
        """Squared error: of the weight, or of the output where the plug-in looks at inputs."""
        groups, made = self._made(weight, scheme, module)
        moments = (
            self._moments(weight.shape[1])
            if self.module.needs_inputs
            else torch.eye(weight.shape[1])
        )
        return float(
            output_error(columns_of(made.values() - groups, scheme, moments), moments).sum()
        )

    def test_it_declares_how_it_works(self) -> None:
        """Whether zero points are whole, and whether a reconstruction can learn its rounding."""
        assert self.module.integer_zeros in (True, False)
        assert self.module.learns_blocks in (True, False)

    def test_whole_zero_points_are_whole_where_it_says_so(self) -> None:
        """What tools store as integers."""
        for scheme in self.schemes() if self.module.integer_zeros else ():
            zero = self._made(self._weight(), scheme)[1].zero
            assert torch.equal(zero, zero.round()), str(scheme)

    def test_it_supports_some_format(self) -> None:
        """A quantizer that supports nothing is a mistake."""
        assert self.schemes()

    def test_every_weight_gets_its_nearest_code(self) -> None:
        """No other code of a group stands for a nearer value, but where the plug-in rounds by what
        goes into the layer.
        """
        for scheme in self.schemes() if not self.module.needs_inputs else ():
            groups, made = self._made(self._weight(), scheme)
            every = [
                replace(made, codes=torch.full_like(made.codes, code)).values()
                for code in range(2**scheme.bits)
            ]
            least = (torch.stack(every) - groups).abs().nan_to_num(torch.inf).amin(0)
            off = float(((made.values() - groups).abs() - least).max())
            assert off <= 1e-5, f"{scheme}: a nearer value is left by {off:.3g}"

    def test_it_does_no_worse_than_min_max(self) -> None:
        """Twice the squared error of min-max (of its integers, for codebooks) is too much; of the
        output's where the plug-in looks at inputs.
        """
        minmax = plugins.load("quantizers", "minmax")
        for scheme in self.schemes():
            plain = (
                scheme if minmax.supports(scheme) else Scheme(f"uint{scheme.bits}", scheme.group)
            )
            ours, theirs = (
                self._error(self._weight(), scheme),
                self._error(self._weight(), plain, minmax),
            )
            assert ours <= (1.0 if self.module.needs_inputs else 2.0) * theirs * (1 + 1e-4), (
                f"{scheme}: {ours:.4g}, min-max {theirs:.4g}"
            )

    def test_codes_fit_the_bits_and_scales_fit_the_granularity(self) -> None:
        """Codes are bytes below 2^bits; one scale, zero or codebook a group, of values that their
        type can store; the bits that a plan is charged.
        """
        for scheme in self.schemes():
            groups, made = self._made(self._weight(), scheme)
            assert made.codes.dtype == torch.uint8, f"{scheme}: {made.codes.dtype}"
            assert made.codes.shape == groups.shape, f"{scheme}: {tuple(made.codes.shape)}"
            assert int(made.codes.max()) < 2**scheme.bits, f"{scheme}: code {int(made.codes.max())}"
            assert made.scale.shape == made.zero.shape == (*groups.shape[:2], 1), (
                f"{scheme}: {tuple(made.scale.shape)}"
            )
            kept = [made.zero, *([] if scheme.family == "block" else [made.scale])]
            if scheme.family == "codebook":
                assert made.levels is not None, f"{scheme}: no codebooks"
                assert made.levels.shape == (*groups.shape[:2], 2**scheme.bits), (
                    f"{scheme}: {tuple(made.levels.shape)}"
                )
                kept.append(made.levels)
            assert all(torch.equal(k.half().float(), k) for k in kept), (
                f"{scheme}: what is stored in fp16 does not fit it"
            )

    def test_degenerate_rows_survive(self) -> None:
        """Rows of zeros, of one constant, of one element, tiny and huge rows give finite weights,
        and zeros stay zero.
        """
        sizes = (0.0, 0.7) if self.module.needs_inputs else (0.0, 0.7, -0.3, 1e-9, 3e4)
        for scheme, size, width in itertools.product(self.schemes(), sizes, (8, 1)):
            groups, made = self._made(torch.full((1, width), size), scheme)
            back = made.values()
            assert torch.isfinite(back).all(), f"{scheme} at {size}"
            assert float((back - groups).abs().max()) <= max(0.71 * size, -size, 1e-7), (
                f"{scheme}: {size} became {float(back[0, 0, 0])}"
            )

    def test_it_is_deterministic(self) -> None:
        """Twice the same weights, twice the same values."""
        for scheme in self.schemes():
            first, second = (self._made(self._weight(), scheme)[1] for _ in range(2))
            assert torch.equal(first.codes, second.codes), str(scheme)
            assert torch.equal(first.values(), second.values()), str(scheme)

    def test_the_error_falls_when_bits_rise(self) -> None:
        """Within a family and granularity, more bits mean less squared error, until a codebook
        holds every weight of its group.
        """
        by_family: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for scheme in self.schemes():
            if scheme.family not in ("float", "block"):
                by_family.setdefault((scheme.family, scheme.group), []).append(
                    (scheme.bits, self._error(self._weight(), scheme))
                )
        for key, found in by_family.items():
            errors = [e for _, e in sorted(found)]
            assert all(a > b or a < 1e-4 for a, b in itertools.pairwise(errors)), f"{key}: {errors}"


def assert_step_law(run: Callable[[Tensor, Scheme], Tensor], *, tolerance: float = 0.3) -> None:
    """A runner that is told min-max integers really steps by them: on Gaussian weights 2 to 4 bits
    gain 14.0 dB, 4 to 8 bits 24.6 dB.

    `run(weight, scheme)` returns the weight [256, 512] that the runner computes with. A runner that
    keeps the scale of 8 bits and clips its codes to fewer, as MixDQ's released sensitivity scripts
    do, is 20 dB off; raises `AssertionError` with what was found.
    """
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    levels = []
    for bits in (2, 4, 8):
        error = (run(weight, Scheme.parse(f"uint{bits}-c")) - weight).double().square().sum()
        levels.append(float(-10 * torch.log10(error / weight.double().square().sum())))
    for (few, many), expected in {(0, 1): 13.98, (1, 2): 24.61}.items():
        gain = levels[many] - levels[few]
        assert abs(gain - expected) <= tolerance, (
            f"{(2, 4, 8)[few]} to {(2, 4, 8)[many]} bits gain {gain:.2f} dB and not "
            f"{expected:.2f}: {levels}"
        )


def statistics_of(x: Tensor, axis: int = -1) -> LayerInputs:
    """What calibration would record of one input whose channels lie on `axis` (its rows are those
    of a linear layer).
    """
    rows = x.movedim(axis, -1).flatten(0, -2)
    low, high = rows.amin(0), rows.amax(0)
    moments = rows.T @ rows / len(rows)
    return LayerInputs(low, high, (low + high) / 2, rows.mean(0), rows[:256], moments)


class ActivationContract(Contract):
    """What holds for every file in `activations/`, in each format of inputs, for linear layers and
    convolutions.
    """

    kind = "activations"

    @property
    def grain(self) -> Any:
        """The plug-in, with the least number of a word that takes one."""
        number = getattr(self.module, "number", None)
        return self.module if number is None else self.module.sized(number.low)

    def test_it_declares_its_word_and_what_a_packed_layer_stores(self) -> None:
        """The word is spelt in small letters; a static grain stores ranges, a dynamic one none."""
        assert re.fullmatch(r"[a-z_]*", self.module.word), self.module.word
        for parts in (False, True):
            held = self.grain.ends(12, parts)
            assert held in ((1, 12) if self.grain.needs_inputs else (0,)), f"{held} ranges"
        assert self.grain.per_channel in (True, False)

    def _cases(self) -> list[tuple[Tensor, int, LayerInputs]]:
        """(input, axis of its channels, calibration on it)."""
        dice = torch.Generator().manual_seed(0)
        out = []
        for module, shape in ((nn.Linear(12, 3), (4, 7, 12)), (nn.Conv2d(6, 3, 3), (4, 6, 5, 5))):
            x = torch.randn(shape, generator=dice)
            axis = -1 if isinstance(module, nn.Linear) else 1
            out.append((x, axis, statistics_of(x, axis)))
        return out

    def _rounded(self, x: Tensor, channel: int, inputs: LayerInputs, form: str) -> Tensor:
        low, high = self.grain.ranges(x, channel, inputs)
        return fake_quantize_between(x, low, high, form)

    def test_nothing_is_clipped_and_steps_are_as_fine_as_the_bits(self) -> None:
        """On what it was calibrated with, an integer is off by half a step at most, and more bits
        are nearer.
        """
        for x, channel, inputs in self._cases():
            low, high = self.grain.ranges(x, channel, inputs)
            errors = []
            for bits in (4, 6, 8):
                off = (self._rounded(x, channel, inputs, str(bits)) - x).abs()
                step = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
                assert float((off / step).max()) <= 0.5 + 2.0**bits * 2.0**-9, (
                    f"{bits} bits: off by {float((off / step).max()):.3f} steps"
                )
                errors.append(float(off.square().mean()))
            assert errors[0] > errors[1] > errors[2], str(errors)

    def test_floats_keep_small_numbers_and_the_largest(self) -> None:
        """Relative errors stay below half a mantissa step in the upper half of every range."""
        for (x, channel, inputs), form in itertools.product(
            self._cases(), ("e4m3", "e3m4", "e2m3", "e3m2", "e5m2")
        ):
            off = (self._rounded(x, channel, inputs, form) - x).abs()
            low, high = self.grain.ranges(x, channel, inputs)
            upper = x.abs() >= 0.5 * low.abs().maximum(high.abs())
            assert (
                float((off[upper] / x.abs()[upper]).max()) <= 0.51 * 2.0 ** -int(form[3]) + 1e-3
            ), form

    def test_degenerate_inputs_survive(self) -> None:
        """Zeros, constants and a single element stay finite, and zeros stay zero."""
        for (x, channel, inputs), form, value in itertools.product(
            self._cases(), ("8", "4", "e4m3", "e2m3"), (0.0, 2.5, -1e-8)
        ):
            made = self._rounded(torch.full_like(x, value), channel, inputs, form)
            assert made.shape == x.shape
            assert torch.isfinite(made).all(), f"{form} at {value}"
            assert value != 0 or float(made.abs().max()) == 0.0, (
                f"{form}: zeros became {float(made.abs().max())}"
            )


class TransformContract(Contract):
    """What holds for every file in `transforms/`: a layer that rounds finely computes what it did,
    and rounding coarsely is not made worse.
    """

    kind = "transforms"

    def _layer(self) -> tuple[nn.Linear, Tensor, LayerInputs]:
        """(a linear layer, inputs like text with one token for all, their record); a channel in six
        is large, and all are off centre.
        """
        dice = torch.Generator().manual_seed(0)
        module = nn.Linear(48, 32)
        nn.init.normal_(module.weight, std=0.2, generator=dice)
        nn.init.normal_(module.bias, generator=dice)
        x = torch.randn(6, 9, 48, generator=dice) * torch.where(
            torch.arange(48) % 6 == 0, 6.0, 0.5
        ) + torch.randn(48, generator=dice)
        x[:, 0] = x[0, 0]
        inputs = replace(statistics_of(x), first=x[0, 0].clone(), rest=statistics_of(x[:, 1:]))
        return module, x, inputs

    def _words(self) -> tuple[Word, ...]:
        declared = self.module.number
        return (
            Word("it", self.module, 0 if declared is None else declared.default or declared.low),
        )

    def _error(self, form: str, words: tuple[Word, ...]) -> float:
        module, x, inputs = self._layer()
        scheme = Scheme.parse(form)
        with torch.no_grad():
            full, bias = module.weight.data, module.bias
            found = fit_input_quantizer(scheme, full, module, inputs, layer="layer", words=words)
            assert found is not None
            weight = found.restore_weight(quantize(found.weight(full), scheme).dequantize())
            rounded = found.fake_quantize(x)
            y = found.output(
                F.linear(rounded, weight, bias), Product(full, weight, bias, x, rounded)
            )
            truth = module(x)
            return float((y - truth).square().sum() / truth.square().sum())

    def test_it_stores_what_it_declares(self) -> None:
        """Names and shapes of what a packed layer gets are those that the plan was charged for; all
        of it is finite.
        """
        module, _, inputs = self._layer()
        (word,) = self._words()
        scheme = Scheme.parse("uint4-c+a8")
        with torch.no_grad():
            full = module.weight.data
            found = fit_input_quantizer(scheme, full, module, inputs, layer="layer", words=(word,))
            assert found is not None
            (stored,), bias = found.pack(full, module.bias)
        declared = self.module.stored(full.shape, 0, word.number)
        assert {n: tuple(v.shape) for n, v in stored.items()} == {
            n: b.shape for n, b in declared.items()
        }
        assert all(bool(torch.isfinite(v).all()) for v in stored.values()), str(stored)
        assert self.module.adds_bias or bias is module.bias

    def test_the_packed_form_computes_what_is_simulated(self) -> None:
        """Without rounding, transforms as stored give the layer's own output."""
        module, x, inputs = self._layer()
        with torch.no_grad():
            full = module.weight.data
            found = fit_input_quantizer(
                Scheme.parse("uint8-c+a8"), full, module, inputs, layer="layer", words=self._words()
            )
            assert found is not None
            (stored,), bias = found.pack(full, module.bias)
            packed = self.module.unpack(stored, full.shape, 0, self._words()[0].number)
            made = F.linear(packed.input(x, -1), found.weight(full), bias)
            torch.testing.assert_close(packed.output(made, x), module(x), rtol=1e-3, atol=1e-3)
            back = packed.restore_weight(found.weight(full))
            torch.testing.assert_close(back, full, rtol=1e-3, atol=1e-4)
            try:
                again = packed.stored_weight(back)
            except QSearchError:
                return  # it holds more of the weight than codes
            torch.testing.assert_close(again, found.weight(full), rtol=1e-3, atol=1e-4)

    def test_fine_rounding_gives_what_the_layer_gave(self) -> None:
        """With 8 bits everywhere the output is within a part in a thousand of its power."""
        assert self._error("uint8-c+a8", self._words()) < 1e-3

    def test_coarse_rounding_is_not_made_much_worse(self) -> None:
        """At 4 bits and one scale for the input, the output's error is at most one and a half times
        that without the transform.
        """
        assert self._error("uint4-c+a4t", self._words()) <= 1.5 * self._error("uint4-c+a4t", ())

    def test_it_is_deterministic(self) -> None:
        """Twice the same layer, twice the same error."""
        assert self._error("uint4-c+a4t", self._words()) == self._error(
            "uint4-c+a4t", self._words()
        )
