"""Regular Hadamard rotation of groups of channels: matrix, and the fast transform on a CPU.

The matrix is a Kronecker power of the 4 x 4 one with a single -1 in each row,

    H4 = 1/2 [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]],

orthogonal and symmetric, so that it is its own inverse. Every row has the same sum (it is regular),
where Sylvester's has one row of ones, which makes an outlier of the channels' mean: rotated inputs
of diffusion transformers had larger outliers than before with that one (pytorch/ao issue 4695), and
none with this (ConvRot, arXiv 2512.03673). A layer computes W x = (W H)(H x): the weight is rotated
once, its input in each call.

H4 is the reversal of I less half of all ones, up to sign: H4 x = reversed(sum(x) / 2 - x). So a
group of 4**n channels takes n passes of two operations an entry, and is written backwards at the
end.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .cpu_rows import Bytes, rows_of
from .jit import compiled
from .reference_a8 import Rows, _activated, quantize_rows

GROUPS = (256, 64, 16)
_NUMBERS = 2**18  # rotated at a time before they are rounded: they stay in the cache


@functools.cache
def matrix(group: int) -> Tensor:
    """fp32 [group, group]: the rotation. Raises `ValueError` where `group` is no power of 4."""
    check(group)
    four = torch.full((4, 4), 0.5)
    for i in range(4):
        four[i, 3 - i] = -0.5
    out = torch.ones(1, 1)
    while len(out) < group:
        out = torch.kron(out, four)
    return out


def group_of(channels: int, largest: int = 256) -> int:
    """The largest of the groups of 16, 64 and 256 channels, up to `largest`, that divides
    `channels`.

    Raises `ValueError` where none does.
    """
    for group in GROUPS:
        if group <= largest and channels % group == 0 and channels:
            return group
    raise ValueError(
        f"a rotation takes groups of 16, 64 or 256 channels (up to {largest}) that divide the "
        f"layer's; none divides {channels}"
    )


def rotate_slow(x: Tensor, group: int) -> Tensor:
    """`x` [..., channels] times the matrix, group by group, in float64 and back: the slow twin."""
    check(group, x.shape[-1])
    turned = x.double().unflatten(-1, (-1, group)) @ matrix(group).double().to(x.device)
    found: Tensor = turned.flatten(-2).to(x.dtype)
    return found


def rotate(x: Tensor, group: int) -> Tensor:
    """`x` [..., channels], each `group` of neighbours rotated; in fp32, rounded once to its type.

    Differentiable (in plain torch operations) where gradients are asked for. Raises `ValueError`
    where `group` does not divide the channels.
    """
    check(group, x.shape[-1])
    fast = None if x.requires_grad or x.device.type != "cpu" else compiled("hadamard_numba")
    if fast is None or x.dtype == torch.float64 or not x.numel():
        return _rotate_torch(x, group)
    if x.dtype == torch.bfloat16 and group <= 64 and _has_bf16():  # a product is faster
        turned = x.reshape(-1, group) @ matrix(group).bfloat16()  # exact, but for one rounding
        return turned.view(x.shape)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=x.dtype)
    step = max(1, _NUMBERS // rows.shape[1])
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step].float().contiguous()
        if x.dtype == torch.float32:
            fast.rotate(part.numpy(), group, out[begin : begin + step].numpy())
        else:
            turned = torch.empty_like(part)
            fast.rotate(part.numpy(), group, turned.numpy())
            out[begin : begin + step] = turned
    return out.view(x.shape)


def rotate_columns(rows: Tensor, group: int, taps: int = 1) -> Tensor:
    """`rows` [..., channels * taps] with their channels rotated: a flattened weight's columns.

    `taps`: places of a convolution's window, which vary fastest; 1 for a linear layer.
    """
    if taps == 1:
        return rotate(rows, group)
    apart = rows.unflatten(-1, (-1, taps)).transpose(-1, -2)
    return rotate(apart, group).transpose(-1, -2).flatten(-2)


def rotate_moments(moments: Tensor, group: int, taps: int = 1) -> Tensor:
    """Second moments [columns, columns] of inputs whose channels are rotated: both sides of
    them.
    """
    return rotate_columns(rotate_columns(moments, group, taps).T.contiguous(), group, taps)


def _has_bf16() -> bool:
    """Whether the machine multiplies bf16 itself."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rotate_quantize_rows(
    x: Tensor,
    rotated: int,
    form: str = "8",
    activation: str = "",
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> Rows:
    """`reference_a8.quantize_rows` of activation(x) / divisor, every `rotated` columns rotated."""
    given = _activated(x, activation)
    moved = given if divisor is None else given / divisor.float()
    turned = rotate_slow(moved, rotated).view(*x.shape[:-1], -1)
    return quantize_rows(turned, form, scale=scale, zero=zero, group=group)


def _rotate_torch(x: Tensor, group: int) -> Tensor:
    """The fast transform in torch's own operations, one pass a digit of the index in base 4."""
    wide = x if x.dtype == torch.float64 else x.float()
    step = 1
    while step < group:
        digit = wide.unflatten(-1, (-1, 4, step))
        wide = (digit.sum(-2, keepdim=True) * 0.5 - digit).flatten(-3)
        step *= 4
    found: Tensor = wide.unflatten(-1, (-1, group)).flip(-1).flatten(-2).to(x.dtype)
    return found


def rotated_rows(
    x: Tensor, group: int, activation: int, low: Tensor | None, high: Tensor | None, *, sums: bool
) -> Bytes:
    """`cpu_rows.rows_of` the rotated rows of `x` [M, K], rounded while they are in the cache."""
    step = max(1, _NUMBERS // max(1, x.shape[1]))
    ends = [None if end is None else end.reshape(-1, 1) for end in (low, high)]
    made = []
    for begin in range(0, len(x), step):
        own = [e if e is None or len(e) == 1 else e[begin : begin + step] for e in ends]
        turned = rotate(x[begin : begin + step], group)
        made.append(rows_of(turned, activation, own[0], own[1], sums=sums))
    if not made:
        return rows_of(x, activation, low, high, sums=sums)
    totals = torch.cat([m.sums for m in made if m.sums is not None]) if sums else None
    codes = torch.cat([m.codes for m in made])
    scale, zero = torch.cat([m.scale for m in made]), torch.cat([m.zero for m in made])
    return Bytes(codes, scale, zero, totals, max(m.largest for m in made))


def check(group: int, channels: int = 0) -> None:
    """Raises `ValueError` for a group that no rotation has, or that does not divide `channels`."""
    if group not in (1, 4, *GROUPS) or channels % group:
        raise ValueError(
            f"a rotation takes groups of 16, 64 or 256 channels that divide the layer's; "
            f"given groups of {group}" + (f" of {channels} channels" if channels else "")
        )
