"""Small floating point: the values of a format, and the nearest code of a number.

A code is the bit pattern of the format, sign first, so that codes of e4m3 and e5m2 are the bytes of
torch.float8_e4m3fn and torch.float8_e5m2. Those two keep OCP's codes for what is not a number; the
formats of 4 and 6 bits have none, nor has e3m4. The magnitude of a number x lies in the binade
floor(log2|x|), where neighbours are 2^(binade - mantissa bits) apart (Kuzmin et al., FP8
Quantization, 2022, section 2.1); the lowest binade reaches down to zero. Ties go to the even
multiple of that step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A sign, `exponent` bits and `mantissa` bits; build it with `FloatFormat.named`."""

    exponent: int
    mantissa: int

    @staticmethod
    def named(name: str) -> FloatFormat:
        """From its name, e.g. "e2m1"."""
        return FloatFormat(int(name[1]), int(name[3]))

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent, as in IEEE 754."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def last(self) -> int:
        """The code of the largest finite value: all ones but for what OCP reserves in e4m3 (one
        NaN) and e5m2 (the top binade).
        """
        reserved = {(4, 3): 1, (5, 2): 4}.get((self.exponent, self.mantissa), 0)
        return (1 << (self.bits - 1)) - 1 - reserved

    @property
    def top(self) -> float:
        """The largest finite value: 6 for e2m1, 448 for e4m3."""
        field, fraction = divmod(self.last, 2**self.mantissa)
        if field == 0:
            raise ValueError(f"{self} has no exponent")
        return float(2.0 ** (field - self.bias) * (1 + fraction / 2**self.mantissa))

    @property
    def highest(self) -> int:
        """The exponent of the largest binade, OCP's emax: 2 for e2m1, 8 for e4m3."""
        return (self.last >> self.mantissa) - self.bias

    @property
    def own_top(self) -> float:
        """The largest value where the largest binade begins at 1: between 1 and 2."""
        return self.top * 2.0**-self.highest

    def encode(self, numbers: Tensor) -> Tensor:
        """Codes (uint8) of fp32 numbers, clipped to the largest value; zero has one code, that
        without a sign.
        """
        clipped = numbers.clamp(-self.top, self.top)
        size = clipped.abs()
        lowest = 1 - self.bias
        binade = torch.where(size > 0, torch.frexp(size).exponent - 1, lowest).clamp(min=lowest)
        steps = torch.ldexp(size, self.mantissa - binade).round().to(torch.int32)
        code = (binade - lowest) * 2**self.mantissa + steps
        sign = ((clipped < 0) & (code > 0)).to(torch.int32) << (self.bits - 1)
        return torch.add(code, sign).to(torch.uint8)

    def round(self, numbers: Tensor) -> Tensor:
        """fp32 numbers at the nearest value of the format, clipped to the largest: what `encode`
        names by a code.
        """
        clipped = numbers.clamp(-self.top, self.top)
        size, lowest = clipped.abs(), 1 - self.bias
        binade = torch.where(size > 0, torch.frexp(size).exponent - 1, lowest).clamp(min=lowest)
        steps = torch.ldexp(size, self.mantissa - binade).round()
        return torch.copysign(torch.ldexp(steps, binade - self.mantissa), clipped)

    def values(self, device: torch.device | str = "cpu") -> Tensor:
        """fp32 [2^bits]: the number that each code stands for; NaN for reserved codes."""
        return _values(self).to(device)


@lru_cache(maxsize=32)
def _values(form: FloatFormat) -> Tensor:
    code = torch.arange(2 ** (form.bits - 1))
    field, fraction = code // 2**form.mantissa, (code % 2**form.mantissa) / 2**form.mantissa
    size = torch.where(field > 0, 1 + fraction, fraction) * torch.exp2(
        (field.clamp(min=1) - form.bias).float()
    )
    size[form.last + 1 :] = torch.nan
    return torch.cat([size, -size])


def fp8_scales(scale: Tensor) -> Tensor:
    """Scales as e4m3 stores them, the smallest for zero."""
    kind = FloatFormat.named("e4m3")
    return kind.values(scale.device)[kind.encode(scale).clamp(min=1).int()]
